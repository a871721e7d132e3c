"""The only decoder: path or bytes to RGB uint8, so that training, serving and scoring see equal pixels."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import DataError, one_line
from models.images.file_ends import check_filled, seems_cut
from models.images.raster import WindowedImage, is_raster, is_tiff, tiff_layout
from models.images.rendering import DEFAULT, Block, Rendering, chosen_bands, find_bounds, oriented, oriented_size, to_uint8

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

# The largest full image of the iSAID / DOTA collection has under 120 million pixels;
# beyond this a file is more likely a decompression bomb than a photograph.
MAX_PIXELS = 400_000_000
# Pillow's own limit is lower, and raises where ours tells what to do.
Image.MAX_IMAGE_PIXELS = None

# Pauses in seconds before a file that is not on this machine is requested once more.
RETRIES = (0.5, 2.0)


class RemoteFile(Protocol):
    """A file that is not on this machine, such as a ``UPath`` of an object store; its text is its URL."""

    @property
    def fs(self) -> Any:
        """Its fsspec file system."""
        ...

    @property
    def path(self) -> str:
        """What the file is called there."""
        ...

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """A stream that fetches only the bytes that are read."""
        ...


Source = str | os.PathLike | RemoteFile


def read_image(source: Source | bytes, rendering: Rendering = DEFAULT) -> np.ndarray:
    """Decode an image file, local or remote, or its bytes to RGB uint8 (H, W, 3).

    Grayscale, palette, RGBA (alpha dropped), CMYK, 16-bit, signed and floating images are converted
    as ``rendering`` says, EXIF orientation is applied, of an animation the first frame is taken.

    Raises:
        DataError: not readable, not an image, truncated, out of reach, or more than MAX_PIXELS.
    """
    name = "image bytes" if isinstance(source, bytes) else str(source)
    with told(name):
        content: Any = source if isinstance(source, (bytes, str, os.PathLike)) else _fetched(source)
        start = content[:32] if isinstance(content, bytes) else _start(content)
        if is_raster(start):
            return _whole_raster(content, rendering, name)
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            _check_size(*image.size, name)
            if image.format == "PNG" and start[24:25] == b"\x10":
                return _sixteen_bit_png(content, image, rendering, name)
            check_filled(image, content, name)
            return _to_rgb(ImageOps.exif_transpose(image), rendering, name)


def _start(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(32)


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} pixels exceed the {MAX_PIXELS:,} that are decoded whole; "
            "save it as a tiled TIFF and score it with a model that predicts by tiles (--tile)",
            "too large",
        )


def _whole_raster(content: Any, rendering: Rendering, name: str) -> np.ndarray:
    image = WindowedImage(content, rendering, name)
    _check_size(image.shape[1], image.shape[0], name)
    return image[:, :]


def _sixteen_bit_png(content: Any, opened: Image.Image, rendering: Rendering, name: str) -> np.ndarray:
    # Pillow keeps the upper byte of 16-bit colours alone; OpenCV keeps both.
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise DataError(f"{name}: cannot be decoded (damaged PNG)", "damaged")
    values = values[:, :, None] if values.ndim == 2 else values
    values = values[:, :, [2, 1, 0, *range(3, values.shape[2])]] if values.shape[2] >= 3 else values
    return np.ascontiguousarray(oriented(_rendered(values, rendering, name), opened.getexif().get(0x0112, 1)))


def _rendered(values: np.ndarray, rendering: Rendering, name: str) -> np.ndarray:
    """Values (H, W, bands), a fourth band being alpha, to RGB uint8."""
    count = values.shape[2]
    alpha = values[:, :, 3] if count == 4 else None
    bands = chosen_bands(rendering, count, [1, 2, 3] if count >= 3 else [1], name)
    shown = np.moveaxis(values[:, :, [band - 1 for band in bands]], -1, 0)
    missing = np.zeros(shown.shape[1:], bool) if alpha is None else alpha == 0
    bounds = find_bounds(
        rendering,
        values.dtype,
        None,
        [Block(shown, np.broadcast_to(missing, shown.shape), 0, 0)],
        (values.shape[0], values.shape[1]),
    )
    image = np.moveaxis(to_uint8(shown, bounds), 0, -1)
    return np.ascontiguousarray(image if len(bands) == 3 else np.repeat(image, 3, axis=2))


@contextmanager
def told(name: str) -> Iterator[None]:
    """Raise errors of the decoder and of the file system as a DataError with its kind."""
    try:
        yield
    except UnidentifiedImageError as error:
        what = f"{name}: not an image that can be read (PNG, JPEG, TIFF, BMP, WebP)"
        raise DataError(what, "not an image") from error
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file", "missing") from error
    except PermissionError as error:
        raise DataError(f"{name}: may not be read (permission denied)", "permission denied") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # A decoder's own errors have no number; those of a disk that is away for the moment have one.
        kind = "damaged" if getattr(error, "errno", None) is None else "unreachable"
        raise DataError(f"{name}: cannot be decoded ({one_line(error)})", kind) from error


def _fetched(source: RemoteFile) -> bytes:
    for pause in (*RETRIES, None):
        try:
            # One request; opening it would ask for its size first, and take a server that is down for a missing file.
            return source.fs.cat_file(source.path)
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:
            # Each store's library has errors of its own.
            if pause is None:
                raise DataError(f"{source}: cannot be fetched ({one_line(error, 160)})", "unreachable") from error
        time.sleep(pause)
    raise AssertionError


class Header(NamedTuple):
    """Check an image file before it is decoded.

    Attributes:
        height: as its pixels lie in the file.
        width: as its pixels lie in the file.
        orientation: EXIF's, 1 to 8.
        cut: it seems to end early, and only decoding it tells whether it does.
    """

    height: int
    width: int
    orientation: int
    cut: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as `read_image` would return it."""
        return oriented_size(self.height, self.width, self.orientation)


def image_size(path: Source) -> tuple[int, int]:
    """(height, width) as `read_image` would return it, from the file's header alone.

    Raises:
        DataError: not readable or not an image.
    """
    with told(str(path)), _stream(path) as stream:
        return oriented_size(*_layout(stream, str(path)))


def image_header(path: Source) -> Header:
    """A file's size and orientation, and whether it seems to end early, from its first and last bytes.

    Raises:
        DataError: not readable or not an image.
    """
    with told(str(path)), _stream(path) as stream:
        height, width, orientation = _layout(stream, str(path))
        return Header(height, width, orientation, seems_cut(stream))


def _stream(path: Source) -> IO[bytes]:
    return open(path, "rb") if isinstance(path, (str, os.PathLike)) else path.open("rb")


def _layout(stream: IO[bytes], name: str) -> tuple[int, int, int]:
    """(height, width, orientation) as they stand in the file."""
    start = stream.read(16)
    stream.seek(0)
    if is_tiff(start):
        return tiff_layout(stream)
    # Not closed: Pillow would close the stream with it, of which more is read.
    image = Image.open(stream)
    # The orientation of a PNG may stand after its pixels: Pillow decodes them to look for it.
    decoded = image.format == "PNG" and "exif" not in image.info
    orientation = image.getexif().get(0x0112, 1)
    if decoded:
        check_filled(image, stream, name)
    return image.size[1], image.size[0], orientation


def _to_rgb(image: Image.Image, rendering: Rendering, name: str) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return _rendered(np.asarray(image)[:, :, None], rendering, name)
    if image.mode in ("LA", "RGBA", "PA"):
        image = image.convert("RGBA")
    elif image.mode != "L":
        image = image.convert("RGB")
    values = np.asarray(image)
    if rendering != DEFAULT:
        return _rendered(values if values.ndim == 3 else values[:, :, None], rendering, name)
    return np.repeat(values[:, :, None], 3, axis=2) if values.ndim == 2 else values[:, :, :3].copy()
