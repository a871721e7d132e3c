"""The only decoder: path or bytes to RGB uint8, so that training, serving and scoring see equal pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import DataError, one_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

# The largest full image of the iSAID / DOTA collection has under 120 million pixels;
# beyond this a file is more likely a decompression bomb than a photograph.
MAX_PIXELS = 400_000_000
# Pillow's own limit is lower, and raises where ours tells what to do.
Image.MAX_IMAGE_PIXELS = None


def read_image(source: str | Path | bytes) -> np.ndarray:
    """Decode an image file or its bytes to RGB uint8 (H, W, 3).

    Grayscale, palette, RGBA (alpha dropped), CMYK and 16-bit images are converted,
    EXIF orientation is applied, of an animation the first frame is taken.

    Raises:
        DataError: not readable, not an image, truncated, or more than MAX_PIXELS.
    """
    name = "image bytes" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{name}: {width} x {height} pixels exceed the {MAX_PIXELS:,} that are decoded whole; "
                    "save it as a tiled TIFF and score it with a model that predicts by tiles (--tile)",
                    "too large",
                )
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        what = f"{name}: not an image that can be read (PNG, JPEG, TIFF, BMP, WebP)"
        raise DataError(what, "not an image") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file", "missing") from None
    except PermissionError:
        raise DataError(f"{name}: may not be read (permission denied)", "permission denied") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{name}: cannot be decoded ({one_line(error)})", "damaged") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as `read_image` would return it, from the file's header alone.

    Raises:
        DataError: not readable or not an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not an image that can be read ({one_line(error)})") from None
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
