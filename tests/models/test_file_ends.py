"""A few bytes, or missing pixels, show that a file ends early; whole files with odd tails pass."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from models.errors import DataError
from models.images.decoding import image_header, read_image
from models.images.file_ends import seems_cut

PIXELS = np.random.default_rng(0).integers(1, 256, (61, 83, 3), dtype=np.uint8)
FORMS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("BMP", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]


def _saved(form: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, form, **options)
    return stream.getvalue()


def _readable(content: bytes) -> bool:
    try:
        read_image(content)
    except DataError:
        return False
    return True


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_every_cut_that_cannot_be_decoded_is_suspected(form, options, tmp_path):
    content = _saved(form, **options)
    assert not seems_cut(io.BytesIO(content))
    for share in (0.2, 0.5, 0.9, 0.999):
        part = content[: int(len(content) * share)]
        (tmp_path / "x").write_bytes(part)
        try:
            suspected = image_header(tmp_path / "x").cut
        except DataError:
            suspected = True
        assert suspected or _readable(part)


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_what_follows_a_whole_image_does_not_make_it_suspect(form, options):
    for tail in (b"\0" * 500, b"a camera's note" * 40, np.random.default_rng(1).bytes(3000)):
        assert not seems_cut(io.BytesIO(_saved(form, **options) + tail))


def test_the_end_of_a_preview_is_not_the_end_of_the_photograph():
    preview = _saved("JPEG")
    whole = _saved("JPEG", comment=preview[:60000])
    assert preview in whole
    assert not seems_cut(io.BytesIO(whole))
    assert seems_cut(io.BytesIO(whole[: len(whole) - len(preview) // 2]))


def test_a_strip_that_nobody_wrote_is_no_cut(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "GTiff", "height": 512, "width": 512, "count": 1, "dtype": "uint8", "tiled": True}
    with rasterio.open(tmp_path / "a.tif", "w", blockxsize=256, blockysize=256, sparse_ok=True, **profile) as file:
        file.write(np.full((1, 256, 256), 9, np.uint8), window=((0, 256), (0, 256)))
    assert not image_header(tmp_path / "a.tif").cut


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(rows: int, channels: int = 3, value: int | None = None, tail: bytes = b"") -> bytes:
    """A PNG of 64 rows that holds only so many, all in order otherwise."""
    colour = {1: 0, 3: 2, 4: 6}[channels]
    pixels = np.random.default_rng(2).integers(1, 256, (64, 80 * channels), dtype=np.uint8)
    pixels = pixels if value is None else np.full_like(pixels, value)
    raw = b"".join(b"\0" + row.tobytes() for row in pixels[:rows])
    head = struct.pack(">IIBBBBB", 80, 64, 8, colour, 0, 0, 0)
    data = zlib.compress(raw)
    chunks = [_chunk(b"IDAT", data[i : i + 700]) for i in range(0, len(data), 700)]
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + b"".join(chunks) + _chunk(b"IEND", b"") + tail


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("rows", [0, 1, 40, 63])
def test_a_png_whose_pixels_end_early_is_not_filled_up_with_black(tmp_path, rows, channels):
    with pytest.raises(DataError, match=r"image bytes: .*(end early \(|cannot be decoded)") as error:
        read_image(_png(rows, channels))
    assert error.value.kind == "damaged"
    (tmp_path / "a.png").write_bytes(_png(rows, channels))
    with pytest.raises(DataError, match=r"a\.png: .*"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_black_png_and_one_with_too_many_rows_are_whole(channels):
    assert not read_image(_png(64, channels, value=0)).any()
    assert read_image(_png(64, channels)).all()
    assert read_image(_png(64, channels, tail=b"more")).all()


def test_an_interlaced_png_that_lacks_its_last_pass():
    def interlaced(missing: int, width: int = 21, height: int = 19) -> bytes:
        # Adam7's passes: x0, y0, dx, dy. All pixels are 200.
        first = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        raw = b""
        for x, y, dx, dy in [*first, (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]:
            columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
            raw += (b"\0" + b"\xc8" * columns) * rows
        head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
        data = zlib.compress(raw[: len(raw) - missing])
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")

    assert (read_image(interlaced(0)) == 200).all()
    for missing in (1, 22, 22 * 9, 22 * 9 + 3):
        with pytest.raises(DataError):
            read_image(interlaced(missing))
    # One row, of which every second pixel is missing.
    assert (read_image(interlaced(0, height=1)) == 200).all()
    with pytest.raises(DataError, match="end early"):
        read_image(interlaced(11, height=1))


def test_a_palette_png_filled_up_with_its_first_colour_is_noticed():
    image = Image.fromarray(np.full((64, 80), 1, np.uint8), "P")
    image.putpalette([200, 10, 10, 5, 5, 5])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    assert (read_image(stream.getvalue()) == 5).all()
    head = struct.pack(">IIBBBBB", 80, 64, 8, 3, 0, 0, 0)
    data = zlib.compress((b"\0" + b"\1" * 80) * 30)
    palette = _chunk(b"PLTE", bytes([200, 10, 10, 5, 5, 5]))
    short = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + palette + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    with pytest.raises(DataError, match="end early"):
        read_image(short)
