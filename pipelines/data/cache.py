"""Decoded images kept in memory up to a limit: training reads the same ones, or their tiles, again and again."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from models.windows import AnyImage, open_image
from pipelines.data.dataset import Sample


class ImageCache:
    """Least recently used decoded images, together at most ``limit_bytes``."""

    def __init__(self, limit_bytes: int = 2 * 1024**3) -> None:
        self.limit_bytes = limit_bytes
        self._held: OrderedDict[str, AnyImage] = OrderedDict()
        self._bytes = 0

    def read(self, sample: Sample) -> np.ndarray:
        """The decoded image, RGB uint8 (H, W, 3); treat it as read-only."""
        key = str(sample.path)
        if key in self._held:
            self._held.move_to_end(key)
        else:
            self._held[key] = open_image(sample.path)
            self._bytes += _bytes(self._held[key])
            while self._bytes > self.limit_bytes and len(self._held) > 1:
                self._bytes -= _bytes(self._held.popitem(last=False)[1])
        return np.asarray(sample.part_of(self._held[key])[:, :])


def _bytes(image: AnyImage) -> int:
    return image.nbytes if isinstance(image, np.ndarray) else 0
