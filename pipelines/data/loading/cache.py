"""Decoded images kept in memory up to a limit: training reads the same ones, or their tiles, again and again."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from cachetools import LRUCache
from torch.utils.data import get_worker_info

from models.images.rendering import Rendering
from models.images.windows import AnyImage, open_image
from pipelines.data.dataset import Sample

# Files that are read by windows and stay open; a process may hold some hundred.
MOST_OPEN = 16


class ImageCache:
    """Least recently used decoded images, together at most ``limit_bytes``, and at most MOST_OPEN open files.

    An image larger than the limit is kept alone. Processes that a loader starts share the
    limit: each has the same part of it.
    """

    def __init__(self, limit_bytes: int = 2 * 1024**3) -> None:
        self._limit = limit_bytes
        self._opened: LRUCache[tuple[str, Rendering], AnyImage] = LRUCache(MOST_OPEN)

    @cached_property
    def _decoded(self) -> LRUCache[tuple[str, Rendering], np.ndarray]:
        # Made by the first image: only then is it known which process reads.
        loader = get_worker_info()
        limit = self._limit // (loader.num_workers if loader else 1)
        # cachetools refuses an item larger than the whole cache; counted as just as large, it displaces all others.
        return LRUCache(limit, getsizeof=lambda image: min(image.nbytes, limit))

    def read(self, sample: Sample) -> np.ndarray:
        """The decoded image, RGB uint8 (H, W, 3); treat it as read-only."""
        key = str(sample.path), sample.rendering
        image: AnyImage | None = self._decoded.get(key)
        if image is None:
            image = self._opened.get(key)
        if image is None:
            image = open_image(sample.path, sample.rendering)
            if isinstance(image, np.ndarray):
                self._decoded[key] = image
            else:
                self._opened[key] = image
        return np.asarray(sample.part_of(image)[:, :])
