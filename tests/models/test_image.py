"""Every kind of file becomes RGB uint8, or one clear error."""

import io

import numpy as np
import pytest
from PIL import Image

from models.errors import DataError
from models.images import decoding as module
from models.images.decoding import image_size, read_image

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def _saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_rgb_png_is_exact():
    assert (read_image(_saved(Image.fromarray(RGB))) == RGB).all()


def test_grayscale_is_repeated():
    gray = RGB[:, :, 0]
    assert (read_image(_saved(Image.fromarray(gray))) == gray[:, :, None]).all()


def test_alpha_is_dropped_not_blended():
    alpha = np.dstack([RGB, np.full(RGB.shape[:2], 3, np.uint8)])
    assert (read_image(_saved(Image.fromarray(alpha, "RGBA"))) == RGB).all()


def test_sixteen_bit_is_scaled_to_its_full_range():
    values = np.array([[0, 32768, 65535]], np.uint16)
    assert read_image(_saved(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "LA"])
def test_other_modes_have_three_channels(mode):
    form = "TIFF" if mode == "CMYK" else "PNG"
    result = read_image(_saved(Image.fromarray(RGB).convert(mode), form))
    assert result.shape == RGB.shape
    assert result.dtype == np.uint8


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif)
    assert read_image(path).shape == (20, 12, 3)
    assert image_size(path) == (20, 12)


@pytest.mark.parametrize(
    "content", [b"", b"no image", _saved(Image.fromarray(RGB))[:-200], _saved(Image.fromarray(RGB))[:40]]
)
def test_damaged_files_name_themselves(tmp_path, content):
    path = tmp_path / "bad file.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad file\.png"):
        read_image(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="exceed the 100 that are decoded whole"):
        read_image(_saved(Image.fromarray(RGB)))
