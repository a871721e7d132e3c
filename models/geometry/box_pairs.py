"""Pairs of boxes that meet, by a sweep along bands of the image; numpy alone, near-linear in the number of boxes."""

from __future__ import annotations

from typing import Literal

import numpy as np

# Where boxes lie in heaps the best are compared first, about this many pairs for each box at a
# time: boxes that they take need no comparison, and memory stays linear.
PAIRS_EACH = 4


def meeting(boxes: np.ndarray, free: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Pairs of boxes that meet, of the first of ``free`` with all of ``free``.

    Returns:
        How many of the first were compared (all, where the pairs are few), and the pairs.
    """
    bands = Bands(boxes[free])
    counts = bands.count(bands)
    total, most = int(counts.sum()), PAIRS_EACH * max(len(free), 1000)
    if total <= 2 * most:
        left, right = bands.pairs(bands, counts)
        return len(free), free[left], free[right]
    compared = max(16, len(free) * most // (2 * total))
    first = Bands(boxes[free[:compared]], bands)
    pairs = [first.pairs(bands, first.count(bands)), bands.pairs(first, bands.count(first))[::-1]]
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return compared, free[left], free[right]


def pairs_among(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of boxes (N, 4) that meet or touch, each once: two int64 arrays of indices.

    >>> [v.tolist() for v in pairs_among(np.array([[0, 0, 2, 2], [2, 2, 3, 3], [5, 0, 6, 1]]))]
    [[0], [1]]
    """
    if not len(boxes):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    bands = Bands(np.asarray(boxes, np.float64))
    return bands.pairs(bands, bands.count(bands))


class Bands:
    """Boxes in horizontal bands, sorted by their left edges within each.

    A box stands in every band that it reaches. Two boxes meet where the left edge of the one lies
    within the other, and are reported in the band that holds the upper edge of what they share.
    """

    def __init__(self, boxes: np.ndarray, like: Bands | None = None) -> None:
        self.boxes = boxes
        if like is None:
            self.height = max(4 * float(np.median(boxes[:, 3] - boxes[:, 1])), 1.0)
            self.left, self.top = boxes[:, 0].min(), boxes[:, 1].min()
            self.span = float(boxes[:, 2].max() - self.left) + 1
        else:
            self.height, self.left, self.top, self.span = like.height, like.left, like.top, like.span
        first = self._band(boxes[:, 1])
        reached = self._band(boxes[:, 3]) - first + 1
        box = np.repeat(np.arange(len(boxes)), reached)
        band = first[box] + _counting(reached)
        begin = band * self.span + boxes[box, 0] - self.left
        order = np.argsort(begin, kind="stable")
        self.box, self.band, self.begin = box[order], band[order], begin[order]
        self.end = self.begin + (boxes[:, 2] - boxes[:, 0])[self.box]

    def _band(self, y: np.ndarray) -> np.ndarray:
        return ((y - self.top) // self.height).astype(np.int64)

    def _ranges(self, other: Bands) -> tuple[np.ndarray, np.ndarray]:
        if other is self:
            return np.arange(1, len(self.begin) + 1), np.searchsorted(self.begin, self.end, side="right")
        # Equal left edges are found from one of the two sides only.
        side: Literal["left", "right"] = "left" if len(self.boxes) < len(other.boxes) else "right"
        return np.searchsorted(other.begin, self.begin, side), np.searchsorted(other.begin, self.end, "right")

    def count(self, other: Bands) -> np.ndarray:
        """How many entries of ``other`` have their left edge within each of these."""
        low, high = self._ranges(other)
        return (high - low).clip(0)

    def pairs(self, other: Bands, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those pairs of (own, other) that meet."""
        low, _ = self._ranges(other)
        own = np.repeat(np.arange(len(counts)), counts)
        its = low[own] + _counting(counts)
        a, b = self.box[own], other.box[its]
        top = np.maximum(self.boxes[a, 1], other.boxes[b, 1])
        meet = top <= np.minimum(self.boxes[a, 3], other.boxes[b, 3])
        meet &= self._band(top) == self.band[own]
        if other is not self and len(self.boxes) < len(other.boxes):
            # The compared boxes are the first of the others: each pair comes once, none of a box with itself.
            meet &= a != b
        return a[meet], b[meet]


def _counting(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of ``counts``, one after the other.

    >>> _counting(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
