"""Decoded images kept in memory up to a limit: training reads the same ones again and again."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from pipelines.data.dataset import Sample


class ImageCache:
    """Least recently used decoded images, together at most ``limit_bytes``."""

    def __init__(self, limit_bytes: int = 2 * 1024**3) -> None:
        self.limit_bytes = limit_bytes
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0

    def read(self, sample: Sample) -> np.ndarray:
        """The decoded image, RGB uint8 (H, W, 3); treat it as read-only."""
        key = str(sample.path)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        image = sample.read()
        self._held[key] = image
        self._bytes += image.nbytes
        while self._bytes > self.limit_bytes and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return image
