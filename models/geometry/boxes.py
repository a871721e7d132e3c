"""Boxes: clipping, areas, IoU, COCO's form and the windows of crops."""

from __future__ import annotations

from typing import Any

import numpy as np


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip xyxy boxes (N, 4) to an image; float32, shape kept.

    >>> clip_boxes(np.array([[-5, 2, 30, 8]]), 6, 20).tolist()
    [[0.0, 2.0, 20.0, 6.0]]
    """
    clipped = np.asarray(boxes, dtype=np.float32).reshape(-1, 4).copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, width)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, height)
    return clipped


def pixel_sized(boxes: np.ndarray) -> np.ndarray:
    """Indices of the clipped xyxy boxes (N, 4), in pixels, that are a pixel wide and high or more.

    A detector may take what it cut to nothing at a border for a plane: RoIAlign sees no image in it, and the score is
    the same wherever it lies (of one detector 0.41 at ten borders of tiles of DOTA).

    >>> pixel_sized(np.array([[0, 0, 9, 1], [0, 639.8, 90, 640]])).tolist()
    [0]
    """
    return np.flatnonzero((boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1))


def xywh_to_xyxy(boxes_xywh: Any) -> np.ndarray:
    """COCO's x, y, width, height (N, 4) to xyxy float32.

    >>> xywh_to_xyxy([[1, 2, 3, 4]]).tolist()
    [[1.0, 2.0, 4.0, 6.0]]
    """
    boxes = np.asarray(boxes_xywh, dtype=np.float64).reshape(-1, 4).copy()
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def xyxy_to_xywh(boxes: Any) -> np.ndarray:
    """xyxy (N, 4) to COCO's x, y, width, height, float64.

    >>> xyxy_to_xywh([[1, 2, 4, 6]]).tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).copy()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Area in pixels of xyxy boxes (N, 4); 0 for empty ones."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of xyxy boxes, (N, 4) and (M, 4) to float64 (N, M).

    >>> box_iou(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).round(3).tolist()
    [[0.333, 0.0]]
    """
    a = np.asarray(a, dtype=np.float64).reshape(-1, 4)
    b = np.asarray(b, dtype=np.float64).reshape(-1, 4)
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = (bottom_right - top_left).clip(0).prod(axis=2)
    union = box_area(a)[:, None] + box_area(b)[None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def crop_window(box: Any, height: int, width: int, margin: float = 0.0) -> tuple[int, int, int, int]:
    """Whole-pixel window (x1, y1, x2, y2) around a box, inside the image, at least 1 x 1.

    ``margin`` widens the box on each side by that share of its own width and height.

    >>> crop_window([10.2, 10.0, 20.5, 20.0], 100, 100)
    (10, 10, 21, 20)
    >>> crop_window([0, 0, 10, 10], 12, 100, margin=0.5)
    (0, 0, 15, 12)
    """
    x1, y1, x2, y2 = (float(v) for v in box)
    dx, dy = margin * (x2 - x1), margin * (y2 - y1)
    left = int(min(max(np.floor(x1 - dx), 0), width - 1))
    top = int(min(max(np.floor(y1 - dy), 0), height - 1))
    right = int(max(min(np.ceil(x2 + dx), width), left + 1))
    bottom = int(max(min(np.ceil(y2 + dy), height), top + 1))
    return left, top, right, bottom


def boxes_back(boxes: np.ndarray, size: tuple[int, int], quarters: int, mirrored: bool) -> np.ndarray:
    """Boxes xyxy (N, 4) of an image that was mirrored, where told, and then turned, as boxes of the image as it was.

    Args:
        size: height and width of the turned image.
        quarters: anticlockwise turns by 90 degrees, as `numpy.rot90` makes them.

    >>> boxes_back(np.array([[0, 0, 2, 1]]), (4, 3), 1, False).tolist()
    [[3, 0, 4, 2]]
    """
    height, width = size
    for _ in range(quarters):
        # A turn clockwise takes column x to row x, and row y to column height - y.
        boxes = np.stack([height - boxes[:, 3], boxes[:, 0], height - boxes[:, 1], boxes[:, 2]], axis=1)
        height, width = width, height
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1) if mirrored else boxes
