"""Detections of the tiles of an image become those of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.geometry.boxes import box_area, clip_boxes, pixel_sized
from models.geometry.rle import CropMask, rle_crop, rle_paste
from models.instances import RLE, Instances
from models.tiling.matching import TileContext, cut_sides, greedy_match, group_cut_detections, hull_groups, members
from models.tiling.settings import Tiling, Window


class TileResult(NamedTuple):
    """The predictions of one tile: instances in tile pixels, and the tile's window in the image."""

    instances: Instances
    window: Window


def merge_tiles(
    image_id: str,
    height: int,
    width: int,
    tile_results: Sequence[TileResult],
    *,
    tiling: Tiling,
    whole: Instances | None = None,
) -> Instances:
    """Merge the predictions of an image's tiles, and of the whole image where ``whole`` is given, into one result.

    With ``join``, detections that tile borders cut out of one plane become one
    (`models.tiling.matching.group_cut_detections`), box and mask, with the mean of their scores
    weighted by area. Then the best of those that show one plane is kept: a detection that no border
    cuts comes before one that is cut, and among uncut ones the highest score wins.

    Args:
        image_id: id of the result.
        height: of the image in pixels, as ``width``.
        tile_results: per tile, in any order.
        tiling: how the image was cut, and how detections are matched.
        whole: predictions for the whole image, in its pixels.
    """
    if whole is not None:
        tile_results = [*tile_results, TileResult(whole, (0, 0, width, height))]
    detections = _gather(tile_results, tiling.shared == 0)
    if tiling.merge == "join":
        sides = cut_sides(detections.boxes, detections.context.regions)
        group = group_cut_detections(
            detections.boxes, detections.labels, sides, threshold=tiling.threshold, context=detections.context
        )
        detections = _joined(detections, group)
    # Uncut ones first, by their scores, then cut ones, the largest first: it shows most of its plane.
    cut = detections.context.cut
    order = np.lexsort([-np.where(cut, box_area(detections.boxes), detections.scores), cut])
    owner = greedy_match(
        detections.boxes,
        order,
        detections.labels,
        threshold=tiling.threshold,
        metric=tiling.match,
        context=detections.context,
    )
    # The best uncut one comes first, so its score stays: the score of a cut one says little about the whole plane.
    # Measured on 18 training images of DOTA: AP50 0.777 so and with the mean of joined ones, 0.766 with the highest
    # score of all in both places.
    boxes = clip_boxes(detections.boxes, height, width)
    # The black beyond the image can hold boxes of which nothing is left.
    keep = np.intersect1d(np.flatnonzero(owner == np.arange(len(owner))), pixel_sized(boxes))
    masks = None
    if detections.masks is not None:
        masks = [rle_paste(*_within(detections.masks[i], height, width), height, width) for i in keep]
    return Instances.make(
        image_id, height, width, boxes[keep], detections.scores[keep], labels=detections.labels[keep], masks=masks
    )


def _within(crop: CropMask, height: int, width: int) -> CropMask:
    mask, left, top = crop
    return CropMask(mask[: max(height - top, 0), : max(width - left, 0)], min(left, width), min(top, height))


class _Detections(NamedTuple):
    """Detections in image pixels, with the tiles that they come from."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    context: TileContext
    masks: list[CropMask] | None


def _gather(tile_results: Sequence[TileResult], touching: bool) -> _Detections:
    has_masks = any(r.instances.masks is not None for r in tile_results)
    tile_results = [r for r in tile_results if len(r.instances)]
    counts = [len(r.instances) for r in tile_results]
    regions = np.repeat(np.array([r.window for r in tile_results], np.float64).reshape(-1, 4), counts, axis=0)
    boxes = np.concatenate([r.instances.boxes for r in tile_results] or [np.zeros((0, 4))]) + np.tile(regions[:, :2], 2)
    cut: np.ndarray = cut_sides(boxes, regions).max(axis=1, initial=False)
    context = TileContext(regions, np.repeat(np.arange(len(tile_results)), counts), cut, touching=touching)
    scores = np.concatenate([r.instances.scores for r in tile_results] or [np.zeros(0)]).astype(np.float64)
    labels = np.concatenate([r.instances.labels for r in tile_results] or [np.zeros(0, np.int64)])
    masks = [_placed(rle, r.window) for r in tile_results for rle in r.instances.masks or ()] if has_masks else None
    return _Detections(boxes, scores, labels, context, masks)


def _placed(rle: RLE, window: Window) -> CropMask:
    crop = rle_crop(rle)
    return CropMask(crop.mask, crop.left + window[0], crop.top + window[1])


def _joined(detections: _Detections, group: np.ndarray) -> _Detections:
    """Join each group into one detection: hull of the boxes and of the regions, union of the masks, mean score by area."""
    context = detections.context
    leaders, boxes = hull_groups(detections.boxes, group)
    if len(leaders) == len(group):
        return detections
    _, regions = hull_groups(context.regions, group)
    of_each = members(group, leaders)
    area = box_area(detections.boxes) + 1e-9
    scores = np.array([np.average(detections.scores[m], weights=area[m]) for m in of_each])
    tiles = np.array([context.tiles[m[0]] if len(m) == 1 else -1 - m[0] for m in of_each])
    joined = {-1 - int(m[0]): frozenset(context.tiles[m].tolist()) for m in of_each if len(m) > 1}
    cut: np.ndarray = cut_sides(boxes, regions).max(axis=1, initial=False)
    masks = None
    if detections.masks is not None:
        crops = detections.masks
        masks = [crops[m[0]] if len(m) == 1 else _union([crops[i] for i in m]) for m in of_each]
    context = TileContext(regions, tiles, cut, joined, context.touching)
    return _Detections(boxes, scores, detections.labels[leaders], context, masks)


def _union(crops: Sequence[CropMask]) -> CropMask:
    crops = [c for c in crops if c.mask.size] or list(crops[:1])
    left, top = min(c.left for c in crops), min(c.top for c in crops)
    right = max(c.left + c.mask.shape[1] for c in crops)
    bottom = max(c.top + c.mask.shape[0] for c in crops)
    union = np.zeros((bottom - top, right - left), bool)
    for mask, x, y in crops:
        union[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
    return CropMask(union, left, top)
