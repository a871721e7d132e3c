"""The only decoder: path or bytes to RGB uint8, so that training, serving and scoring see equal pixels."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import DataError, one_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

# The largest full image of the iSAID / DOTA collection has under 120 million pixels;
# beyond this a file is more likely a decompression bomb than a photograph.
MAX_PIXELS = 400_000_000
# Pillow's own limit is lower, and raises where ours tells what to do.
Image.MAX_IMAGE_PIXELS = None

# Pauses in seconds before a file that is not on this machine is asked for once more.
RETRIES = (0.5, 2.0)


class RemoteFile(Protocol):
    """A file that is not on this machine, such as a ``UPath`` of an object store; its text is its URL.

    fs: its fsspec file system, path: what the file is called there.
    """

    fs: Any
    path: str

    def open(self, mode: str) -> IO[bytes]:
        """A stream that fetches what is read of it."""
        ...


Source = str | os.PathLike | RemoteFile


def read_image(source: Source | bytes) -> np.ndarray:
    """Decode an image file, here or elsewhere, or its bytes to RGB uint8 (H, W, 3).

    Grayscale, palette, RGBA (alpha dropped), CMYK and 16-bit images are converted,
    EXIF orientation is applied, of an animation the first frame is taken.

    Raises:
        DataError: not readable, not an image, truncated, out of reach, or more than MAX_PIXELS.
    """
    name = "image bytes" if isinstance(source, bytes) else str(source)
    with _told(name):
        content: Any = source if isinstance(source, (bytes, str, os.PathLike)) else _fetched(source)
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{name}: {width} x {height} pixels exceed the {MAX_PIXELS:,} that are decoded whole; "
                    "save it as a tiled TIFF and score it with a model that predicts by tiles (--tile)",
                    "too large",
                )
            return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the decoder and the file system raise, as a DataError with its kind."""
    try:
        yield
    except UnidentifiedImageError:
        what = f"{name}: not an image that can be read (PNG, JPEG, TIFF, BMP, WebP)"
        raise DataError(what, "not an image") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file", "missing") from None
    except PermissionError:
        raise DataError(f"{name}: may not be read (permission denied)", "permission denied") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{name}: cannot be decoded ({one_line(error)})", "damaged") from None


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
                raise DataError(f"{source}: cannot be fetched ({one_line(error)[:160]})", "unreachable") from None
        time.sleep(pause)
    raise AssertionError


def image_size(path: Source) -> tuple[int, int]:
    """(height, width) as `read_image` would return it, from the file's header alone.

    Raises:
        DataError: not readable or not an image.
    """
    with _told(str(path)):
        stream: Any = path if isinstance(path, (str, os.PathLike)) else path.open("rb")
        with Image.open(stream) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files use the full range by convention, whatever part of it is filled.
        scale = 255 / 65535 if values.size and values.max() > 255 else 1.0
        gray = (values * scale).round().clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("LA", "RGBA", "PA"):
        image = image.convert("RGBA")
        return np.asarray(image)[:, :, :3].copy()
    return np.array(image.convert("RGB"))
