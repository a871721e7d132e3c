"""Images that are read window by window: arrays in memory, and files too large for it."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from models.geometry.boxes import boxes_back
from models.images.decoding import Source, image_size, read_image, told
from models.images.raster import WindowedImage, tiff_layout
from models.images.remote_bytes import WORTH_IT, RemoteBytes
from models.images.rendering import DEFAULT, Rendering

# Above this many pixels a TIFF is not decoded as a whole.
WINDOWED_PIXELS = 100_000_000
WINDOWED_SUFFIXES = (".tif", ".tiff")


class TurnedImage:
    """An image mirrored, where told, and then turned anticlockwise, window by window: RGB uint8 (H, W, 3) by ``shape``.

    Args:
        image: array or `WindowedImage`; nothing of it is copied or read before a window is asked for.
        quarters: turns by 90 degrees, 0 to 3.
    """

    def __init__(self, image: np.ndarray | WindowedImage, quarters: int, mirrored: bool) -> None:
        self.image, self.quarters, self.mirrored = image, quarters, mirrored
        height, width = image.shape[:2]
        self.shape = (width, height, 3) if quarters % 2 else (height, width, 3)

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """RGB uint8 (h, w, 3) of two slices without steps.

        Raises:
            DataError: that part of a file is damaged.
        """
        (y1, y2, _), (x1, x2, _) = (s.indices(extent) for s, extent in zip(key, self.shape[:2], strict=True))
        window = np.array([[x1, y1, max(x1, x2), max(y1, y2)]])
        x1, y1, x2, y2 = boxes_back(window, self.shape[:2], self.quarters, self.mirrored)[0].tolist()
        return self._turned(np.asarray(self.image[y1:y2, x1:x2]))

    def check(self) -> None:
        """See `WindowedImage`."""
        if isinstance(self.image, WindowedImage):
            self.image.check()

    def shrunk(self, height: int, width: int) -> np.ndarray:
        """The whole image at that size."""
        size = (width, height) if self.quarters % 2 else (height, width)
        return self._turned(_shrunk_to(self.image, *size))

    def _turned(self, pixels: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(pixels[:, ::-1] if self.mirrored else pixels, self.quarters))


AnyImage = np.ndarray | WindowedImage | TurnedImage


def open_image(path: Source, rendering: Rendering = DEFAULT) -> AnyImage:
    """An image whole, or as a `WindowedImage` where it is a large TIFF; of one that is elsewhere parts are fetched.

    Raises:
        DataError: not readable, or too large to be decoded whole and no TIFF.
    """
    if isinstance(path, (str, os.PathLike)):
        if Path(path).suffix.lower() in WINDOWED_SUFFIXES:
            height, width = image_size(path)
            if height * width > WINDOWED_PIXELS:
                return WindowedImage(Path(path), rendering)
    elif path.path.lower().endswith(WINDOWED_SUFFIXES):
        with told(str(path)):
            content = RemoteBytes(path)
            if content.size > WORTH_IT and _pixels(content) > WINDOWED_PIXELS:
                return WindowedImage(content, rendering, str(path))
    return read_image(path, rendering)


def _pixels(content: RemoteBytes) -> int:
    """Of a TIFF; 0 of a file that is none, which is fetched whole to see what it is."""
    try:
        with content.stream() as stream:
            height, width, _ = tiff_layout(stream)
    except ValueError:
        return 0
    return height * width


def shrunk(image: AnyImage, longest: int) -> np.ndarray:
    """The whole image with its longer side at most ``longest`` pixels, averaged, RGB uint8."""
    height, width = image.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return _shrunk_to(image, *size)


def _shrunk_to(image: AnyImage, height: int, width: int) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        return image.shrunk(height, width)
    return image if image.shape[:2] == (height, width) else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


# Brightness between the 1st and the 99th percentile, of 255, below which an image is called pale or dark as read.
LITTLE = 32


def fills_little(image: AnyImage) -> bool:
    """Whether an image, as it is read, uses less than an eighth of 0 to 255: a sign of a range that does not fit its file.

    Black, which missing imagery is, does not count; of a file that is read by windows sixteen places are looked at.
    """
    if isinstance(image, np.ndarray):
        step = max(1, int(np.sqrt(image.shape[0] * image.shape[1] / 100_000)))
        seen = image[::step, ::step].reshape(-1, 3)
    else:
        tops, lefts = (np.linspace(0, max(extent - 64, 0), 4).astype(int) for extent in image.shape[:2])
        seen = np.concatenate([image[y : y + 64, x : x + 64].reshape(-1, 3) for y in tops for x in lefts])
    counts = np.bincount(seen.ravel(), minlength=256)
    # Of black pixels alone all three values are 0.
    counts[0] -= 3 * np.count_nonzero((seen[:, 0] | seen[:, 1] | seen[:, 2]) == 0)
    if not counts.any():
        return False
    low, high = np.searchsorted(np.cumsum(counts), [0.01 * counts.sum(), 0.99 * counts.sum()])
    return bool(high - low < LITTLE)
