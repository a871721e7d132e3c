"""Decoded images kept in memory up to a limit: training reads the same ones, or their tiles, again and again."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from models.images.rendering import Rendering
from models.images.windows import AnyImage, open_image
from pipelines.data.dataset import Sample

# Files that are read by windows and stay open; a process may hold some hundred.
MOST_OPEN = 16


class ImageCache:
    """Least recently used decoded images, together at most ``limit_bytes``, and at most MOST_OPEN open files."""

    def __init__(self, limit_bytes: int = 2 * 1024**3) -> None:
        self.limit_bytes = limit_bytes
        self._held: OrderedDict[tuple[str, Rendering], AnyImage] = OrderedDict()
        self._bytes = 0

    def read(self, sample: Sample) -> np.ndarray:
        """The decoded image, RGB uint8 (H, W, 3); treat it as read-only."""
        key = str(sample.path), sample.rendering
        if key in self._held:
            self._held.move_to_end(key)
        else:
            self._held[key] = open_image(sample.path, sample.rendering)
            self._bytes += _bytes(self._held[key])
            while self._bytes > self.limit_bytes and len(self._held) > 1:
                self._bytes -= _bytes(self._held.popitem(last=False)[1])
            opened = [k for k, image in self._held.items() if not isinstance(image, np.ndarray)]
            for oldest in opened[:-MOST_OPEN]:
                del self._held[oldest]
        return np.asarray(sample.part_of(self._held[key])[:, :])


def _bytes(image: AnyImage) -> int:
    return image.nbytes if isinstance(image, np.ndarray) else 0
