"""Detections of the tiles of an image become those of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.geometry.boxes import box_area, clip_boxes
from models.geometry.rle import rle_crop, rle_paste
from models.instances import RLE, Instances
from models.tiling.matching import TileContext, cut_sides, greedy_match, group_cut_detections, hull_groups, members
from models.tiling.settings import Tiling, Window


class Part(NamedTuple):
    """What one tile shows: findings in tile pixels and the tile's window."""

    found: Instances
    window: Window


def merge_parts(
    image_id: str, height: int, width: int, parts: Sequence[Part], tiling: Tiling, whole: Instances | None = None
) -> Instances:
    """One result from what the tiles of an image show, and ``whole``, found in the whole image.

    With ``join``, parts of cut planes become one (`models.tiling.matching.group_cut_detections`), box and
    mask, with the mean of their scores weighted by area. Then of those that show one plane the
    best is kept, one that no border cuts before one that is cut, with the highest score
    among those that are whole.
    """
    if whole is not None:
        parts = [*parts, Part(whole, (0, 0, width, height))]
    pieces = _gather(parts, tiling.shared == 0)
    if tiling.merge == "join":
        sides = cut_sides(pieces.boxes, pieces.seen.regions)
        group = group_cut_detections(pieces.boxes, pieces.labels, sides, tiling.threshold, pieces.seen)
        pieces = _joined(pieces, group)
    # Whole ones first, by their scores, then parts, the largest first: it shows most of its plane.
    cut = pieces.seen.cut
    order = np.lexsort([-np.where(cut, box_area(pieces.boxes), pieces.scores), cut])
    owner = greedy_match(pieces.boxes, order, pieces.labels, tiling.threshold, tiling.match, pieces.seen)
    # The best whole one comes first, so its score stays: what a part scores says little about the whole. Measured
    # on 18 training images of DOTA: AP50 0.777 so and with the mean of joined parts, 0.766 with the highest score of
    # all in both places.
    boxes = clip_boxes(pieces.boxes, height, width)
    # The black beyond the image can hold boxes of which nothing is left.
    inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    keep = np.flatnonzero((owner == np.arange(len(owner))) & inside)
    masks = None
    if pieces.masks is not None:
        masks = [rle_paste(*_within(pieces.masks[i], height, width), height, width) for i in keep]
    return Instances.make(image_id, height, width, boxes[keep], pieces.scores[keep], pieces.labels[keep], masks)


def _within(mask: tuple[np.ndarray, int, int], height: int, width: int) -> tuple[np.ndarray, int, int]:
    part, left, top = mask
    return part[: max(height - top, 0), : max(width - left, 0)], min(left, width), min(top, height)


class _Pieces(NamedTuple):
    """Detections in image pixels, with the tiles that they come from; masks as (bool part, left, top)."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    seen: TileContext
    masks: list[tuple[np.ndarray, int, int]] | None


def _gather(parts: Sequence[Part], touching: bool) -> _Pieces:
    has_masks = any(p.found.masks is not None for p in parts)
    parts = [p for p in parts if len(p.found)]
    counts = [len(p.found) for p in parts]
    regions = np.repeat(np.array([p.window for p in parts], np.float64).reshape(-1, 4), counts, axis=0)
    boxes = np.concatenate([p.found.boxes for p in parts] or [np.zeros((0, 4))]) + np.tile(regions[:, :2], 2)
    cut: np.ndarray = cut_sides(boxes, regions).max(axis=1, initial=False)
    seen = TileContext(regions, np.repeat(np.arange(len(parts)), counts), cut, touching=touching)
    scores = np.concatenate([p.found.scores for p in parts] or [np.zeros(0)]).astype(np.float64)
    labels = np.concatenate([p.found.labels for p in parts] or [np.zeros(0, np.int64)])
    masks = [_placed(rle, p.window) for p in parts for rle in p.found.masks or ()] if has_masks else None
    return _Pieces(boxes, scores, labels, seen, masks)


def _placed(rle: RLE, window: Window) -> tuple[np.ndarray, int, int]:
    mask, left, top = rle_crop(rle)
    return mask, left + window[0], top + window[1]


def _joined(pieces: _Pieces, group: np.ndarray) -> _Pieces:
    """The parts of each group as one: hull of the boxes and of what is seen, union of the masks, mean score by area."""
    leaders, boxes = hull_groups(pieces.boxes, group)
    if len(leaders) == len(group):
        return pieces
    _, regions = hull_groups(pieces.seen.regions, group)
    of_each = members(group, leaders)
    area = box_area(pieces.boxes) + 1e-9
    scores = np.array([np.average(pieces.scores[m], weights=area[m]) for m in of_each])
    own_tiles = pieces.seen.tiles
    tiles = np.array([own_tiles[m[0]] if len(m) == 1 else -1 - m[0] for m in of_each])
    joined = {-1 - int(m[0]): frozenset(own_tiles[m].tolist()) for m in of_each if len(m) > 1}
    cut: np.ndarray = cut_sides(boxes, regions).max(axis=1, initial=False)
    masks = None
    if pieces.masks is not None:
        own = pieces.masks
        masks = [own[m[0]] if len(m) == 1 else _union([own[i] for i in m]) for m in of_each]
    return _Pieces(
        boxes, scores, pieces.labels[leaders], TileContext(regions, tiles, cut, joined, pieces.seen.touching), masks
    )


def _union(masks: Sequence[tuple[np.ndarray, int, int]]) -> tuple[np.ndarray, int, int]:
    masks = [m for m in masks if m[0].size] or list(masks[:1])
    left, top = min(m[1] for m in masks), min(m[2] for m in masks)
    right = max(m[1] + m[0].shape[1] for m in masks)
    bottom = max(m[2] + m[0].shape[0] for m in masks)
    union = np.zeros((bottom - top, right - left), bool)
    for mask, x, y in masks:
        union[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
    return union, left, top
