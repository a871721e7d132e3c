"""Matching of detections that show one plane: suppression, and grouping of those that tile borders cut; no torch.

Candidates for a match come from `models.geometry.box_pairs`, the best detections first, so that detections
that a better one has taken are not compared again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from models.geometry.box_pairs import meeting, pairs_among
from models.geometry.boxes import box_area

Metric = Literal["iou", "ios"]

# A detector's box of a cut plane ends near the border, not always on it: within this
# share of the box's own extent, at least and at most so many pixels, it counts as cut.
SLACK, SLACK_SHARE, MOST_SLACK = 2.0, 0.06, 8.0


@dataclass(frozen=True)
class TileContext:
    """The tiles that detections come from.

    Detections of one tile are never merged (they passed the detector's own suppression), those of different tiles are
    compared inside the region that both tiles show.

    Attributes:
        regions: (N, 4) float64, xyxy of each detection's tile in image pixels.
        tiles: (N,) int64, number of the tile.
        cut: (N,) bool, whether a tile border cuts the plane. The box of a cut detection is smaller than the visible
            share of the whole plane's box, so they are compared by intersection over the smaller area, whatever
            the metric.
        joined: the tiles of each joined detection, by the (negative) number that stands for them in ``tiles``.
        touching: tiles do not overlap, so the stretches along the border that two of them share are compared.
    """

    regions: np.ndarray
    tiles: np.ndarray
    cut: np.ndarray
    joined: Mapping[int, frozenset[int]] = field(default_factory=dict)
    touching: bool = False

    def take(self, index: np.ndarray) -> TileContext:
        """The context of the detections ``index``."""
        return replace(self, regions=self.regions[index], tiles=self.tiles[index], cut=self.cut[index])

    def share_tile(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Whether one tile shows both detections of a pair uncut, so that they are two planes; bool (K,)."""
        result = self.tiles[left] == self.tiles[right]
        whole = ~self.cut[left] & ~self.cut[right]
        for k in np.flatnonzero(whole & ((self.tiles[left] < 0) | (self.tiles[right] < 0))).tolist():
            a, b = int(self.tiles[left[k]]), int(self.tiles[right[k]])
            result[k] = bool(self.joined.get(a, frozenset([a])) & self.joined.get(b, frozenset([b])))
        return result


def greedy_match(
    boxes: np.ndarray,
    order: np.ndarray,
    labels: np.ndarray,
    *,
    threshold: float,
    metric: Metric = "iou",
    context: TileContext | None = None,
) -> np.ndarray:
    """Return for each detection the one that it is merged into, itself where it survives.

    Greedy, as non-maximum suppression is: in ``order`` each detection that is still free
    takes the free ones of its class whose overlap with it is at least ``threshold``.

    Args:
        boxes: (N, 4) xyxy.
        order: (N,) indices, best first.
        labels: (N,) classes, kept apart.
        threshold: least overlap of two detections of one plane.
        metric: ``iou``, or ``ios``: intersection over the smaller area.
        context: the tiles of the detections, by which they are compared as `TileContext` describes.

    Returns:
        int64 (N,) indices.

    >>> boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [30, 0, 40, 10]])
    >>> greedy_match(boxes, np.arange(3), np.zeros(3), threshold=0.5).tolist()
    [0, 0, 2]
    """
    # From here on a detection's number is its rank.
    ranked = np.asarray(boxes, np.float64).reshape(-1, 4)[order]
    labels = np.asarray(labels)[order]
    context = None if context is None else context.take(order)
    reach = 0.0 if context is None else SLACK
    grown = ranked + [-reach, -reach, reach, reach]
    owner = np.full(len(ranked), -1, np.int64)
    free = np.arange(len(ranked))
    while len(free):
        compared, left, right = meeting(grown, free)
        left, right = np.minimum(left, right), np.maximum(left, right)
        left, right = _keep(left, right, labels[left] == labels[right])
        value = overlap(ranked, left, right, metric=metric, context=context)
        left, right, value = left[value >= threshold], right[value >= threshold], value[value >= threshold]
        if context is not None:
            # Planes side by side are side by side in both tiles: of the uncut ones only the
            # best match is the same plane.
            best = _is_best(left, context.tiles[right], value) | context.cut[left] | context.cut[right]
            left, right = _keep(left, right, best & ~context.share_tile(left, right))
        _take(owner, free[:compared], left, right)
        free = free[owner[free] < 0]
    taker = np.empty(len(ranked), np.int64)
    taker[order] = np.asarray(order)[owner]
    return taker


def _keep(left: np.ndarray, right: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return left[mask], right[mask]


def _take(owner: np.ndarray, takers: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Let each of ``takers``, in order, take its free matches."""
    by_taker = np.argsort(left, kind="stable")
    left, right = left[by_taker], right[by_taker]
    matching, starts = np.unique(left, return_index=True)
    ends = np.append(starts[1:], len(left))[: len(starts)]
    for taker, start, end in zip(matching.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if owner[taker] < 0:
            matches = right[start:end]
            owner[matches[owner[matches] < 0]] = taker
            owner[taker] = taker
    free = takers[owner[takers] < 0]
    owner[free] = free


def overlap(
    boxes: np.ndarray, left: np.ndarray, right: np.ndarray, *, metric: Metric, context: TileContext | None = None
) -> np.ndarray:
    """Overlap of the pairs of boxes (left[k], right[k]), float64 (K,).

    With ``context``, boxes are compared inside the region that both tiles show, and pairs of one tile have none.
    """
    a, b = boxes[left], boxes[right]
    if context is None:
        return _ratio(box_area(_meet(a, b)), box_area(a), box_area(b), metric)
    shared = _meet(context.regions[left], context.regions[right])
    lines = (np.abs(shared[:, 2:] - shared[:, :2]) < 1e-6) & context.touching
    visible_a, visible_b = _inside(a, shared, lines), _inside(b, shared, lines)
    areas = box_area(_meet(visible_a, visible_b)), box_area(visible_a), box_area(visible_b)
    value = np.where(context.cut[left] | context.cut[right], _ratio(*areas, "ios"), _ratio(*areas, metric))
    return np.where(context.tiles[left] == context.tiles[right], 0.0, value)


def _meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1)


def _inside(boxes: np.ndarray, shared: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Clip boxes to the shared region; across a mere line (K, 2) a box that reaches it counts as one pixel wide."""
    clipped = _meet(boxes, shared)
    reaches = (boxes[:, :2] <= shared[:, :2] + SLACK) & (boxes[:, 2:] >= shared[:, :2] - SLACK)
    low = np.where(lines, 0.0, clipped[:, :2])
    high = np.where(lines, reaches.astype(float), clipped[:, 2:])
    return np.concatenate([low, high], axis=1)


def _ratio(both: np.ndarray, a: np.ndarray, b: np.ndarray, metric: Metric) -> np.ndarray:
    under = a + b - both if metric == "iou" else np.minimum(a, b)
    return np.divide(both, under, out=np.zeros_like(both), where=under > 0)


def _hulls(boxes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The hull of the boxes of each group, (N, 4), at the index that is the group's number."""
    hulls = np.concatenate([np.full((len(boxes), 2), np.inf), np.full((len(boxes), 2), -np.inf)], axis=1)
    np.minimum.at(hulls[:, :2], group, boxes[:, :2])
    np.maximum.at(hulls[:, 2:], group, boxes[:, 2:])
    return hulls


def cut_sides(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Which sides (left, top, right, bottom) of each box lie on a border of its tile, bool (N, 4).

    The image's own left and upper border do not count; its extent plays no role, so that padding changes nothing.
    """
    extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    near: np.ndarray = np.abs(boxes - regions) <= np.clip(SLACK_SHARE * extent, SLACK, MOST_SLACK)
    near[:, :2] &= regions[:, :2] > 0
    return near


def group_cut_detections(
    boxes: np.ndarray, labels: np.ndarray, sides: np.ndarray, *, threshold: float, context: TileContext
) -> np.ndarray:
    """Group the detections of one plane that tile borders cut: the least index of each group, int64 (N,).

    Two cut detections belong together where one is cut on one side and the other on the opposite
    one (``sides``, see `cut_sides`), they overlap inside the region that both tiles show, and for one of
    them no detection of the other's tile overlaps better. Groups are transitive, so a plane may
    stretch over any number of tiles.
    """
    group = np.arange(len(boxes))
    some = np.flatnonzero(sides.any(axis=1))
    if not len(some):
        return group
    left, right = pairs_among(boxes[some] + [-SLACK, -SLACK, SLACK, SLACK])
    left, right = some[np.minimum(left, right)], some[np.maximum(left, right)]
    left, right = _keep(left, right, labels[left] == labels[right])
    shared = overlap(boxes, left, right, metric="ios", context=context)
    left, right, shared = left[shared >= threshold], right[shared >= threshold], shared[shared >= threshold]
    # Cut detections of neighbours may lie within one another's boxes; those of one plane agree in size too.
    uncut = replace(context, cut=np.zeros(len(boxes), bool))
    value = shared + overlap(boxes, left, right, metric="iou", context=uncut)
    best = _is_best(left, context.tiles[right], value) | _is_best(right, context.tiles[left], value)
    facing = (sides[left] & sides[right][:, [2, 3, 0, 1]]).any(axis=1)
    left, right = _keep(left, right, best & facing)
    while len(left):
        least = np.minimum(group[left], group[right])
        previous = group.copy()
        np.minimum.at(group, left, least)
        np.minimum.at(group, right, least)
        if (group == previous).all():
            break
    return group


def _is_best(one: np.ndarray, tile: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Which pairs have the highest value among those of the same detection with the same other tile, bool (K,)."""
    order = np.lexsort([value, tile, one])
    last = np.ones(len(order), bool)
    last[:-1] = (one[order][1:] != one[order][:-1]) | (tile[order][1:] != tile[order][:-1])
    best = np.zeros(len(order), bool)
    best[order] = last
    return best


def hull_groups(boxes: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(least index of each group, its hull) for groups named by their least index."""
    leaders = np.unique(group)
    return leaders, _hulls(boxes, group)[leaders]


def members(group: np.ndarray, leaders: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Indices of the members of each group, ascending."""
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.asarray(leaders))
    ends = np.searchsorted(group[order], np.asarray(leaders), side="right")
    return [order[a:b] for a, b in zip(bounds, ends, strict=True)]
