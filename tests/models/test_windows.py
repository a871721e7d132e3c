"""Windows of large files: the same pixels as the decoder of whole images gives."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image

from models.engines.composed import ComposedArchitecture, save_composed
from models.errors import DataError
from models.images import windows
from models.images.decoding import read_image
from models.images.windows import WindowedImage, open_image, shrunk
from models.loading import load_model
from models.saved.folder import read_weights, save_model
from models.saved.spec import read_spec
from models.tiling.settings import Tiling
from tests.models.test_contract import _detector, _segmenter

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (150, 210, 3), dtype=np.uint8)
RGBA = np.concatenate([RGB, RGB[:, :, :1]], axis=2)


def _tiff(path, values, **options):
    """Write (bands, H, W) as a tiled TIFF."""
    count, height, width = values.shape
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", **profile, **blocks, **options) as file:
        file.write(values)
    return path


MAKERS = {
    "rgb": lambda p: _tiff(p, RGB.transpose(2, 0, 1), photometric="RGB"),
    "rgb deflated": lambda p: _tiff(p, RGB.transpose(2, 0, 1), photometric="RGB", compress="deflate"),
    "rgba": lambda p: _tiff(p, RGBA.transpose(2, 0, 1), photometric="RGB", alpha="yes"),
    "gray": lambda p: _tiff(p, RGB[None, :, :, 1]),
    "16-bit gray": lambda p: _tiff(p, RGB[None, :, :, 1].astype(np.uint16) * 257 - (RGB[None, :, :, 1] > 9)),
    "16-bit gray, low values": lambda p: _tiff(p, RGB[None, :, :, 1].astype(np.uint16)),
    "palette": lambda p: (Image.fromarray(RGB).quantize(50).save(p), p)[1],
    "strips": lambda p: (Image.fromarray(RGB).save(p, compression="tiff_lzw"), p)[1],
}


@pytest.mark.parametrize("kind", MAKERS)
def test_windows_are_parts_of_the_whole(kind, tmp_path):
    path = MAKERS[kind](tmp_path / "a.tif")
    whole, image = read_image(path), WindowedImage(path)
    assert image.shape == whole.shape == (150, 210, 3)
    assert (image[:, :] == whole).all()
    for y1, y2, x1, x2 in ((0, 64, 0, 64), (50, 149, 3, 210), (149, 400, 209, 500), (10, 10, 5, 9)):
        part = image[y1:y2, x1:x2]
        assert part.dtype == np.uint8
        assert np.array_equal(part, whole[y1:y2, x1:x2])


def test_a_shrunken_large_file_looks_like_the_image(tmp_path):
    smooth = cv2.GaussianBlur(cv2.resize(RGB, (800, 600)), (0, 0), 9)
    path = _tiff(tmp_path / "a.tif", smooth.transpose(2, 0, 1), photometric="RGB")
    small, expected = shrunk(WindowedImage(path), 200), shrunk(smooth, 200)
    assert small.shape == expected.shape == (150, 200, 3)
    assert np.abs(small.astype(int) - expected).max() <= 3


def test_only_large_tiffs_are_opened_by_windows(tmp_path, monkeypatch):
    path = MAKERS["rgb"](tmp_path / "a.tif")
    assert isinstance(open_image(path), np.ndarray)
    monkeypatch.setattr(windows, "WINDOWED_PIXELS", 1000)
    assert isinstance(open_image(path), WindowedImage)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert isinstance(open_image(tmp_path / "a.png"), np.ndarray)


def test_what_cannot_be_read_says_so(tmp_path, monkeypatch):
    (tmp_path / "x.tif").write_bytes(b"II*\0 nonsense")
    with pytest.raises(DataError, match=r"x\.tif"):
        WindowedImage(tmp_path / "x.tif")
    path = MAKERS["rgb deflated"](tmp_path / "d.tif")
    content = bytearray(path.read_bytes())
    content[8 : len(content) // 2] = bytes(len(content) // 2 - 8)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.tif"):
        WindowedImage(path)[:, :]


def test_a_large_png_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("models.images.decoding.MAX_PIXELS", 1000)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="save it as a tiled TIFF"):
        open_image(tmp_path / "a.png")


def test_a_composition_outlines_in_windows_what_it_outlines_in_the_array(tmp_path):
    spec = read_spec(_detector(tmp_path / "d"))
    save_model(tmp_path / "d", spec.model_copy(update={"tiling": Tiling(size=96)}), read_weights(tmp_path / "d"))
    unet = _segmenter(tmp_path / "u", network="unet", encoder="resnet18")
    composed = load_model(save_composed(tmp_path / "c", tmp_path / "d", unet, ComposedArchitecture(), components={}))
    of_array = composed.predict([RGB])[0]
    of_windows = composed.predict([WindowedImage(MAKERS["rgb"](tmp_path / "a.tif"))])[0]
    assert len(of_array) > 0
    assert of_array.boxes.tolist() == of_windows.boxes.tolist()
    assert of_array.masks == of_windows.masks
