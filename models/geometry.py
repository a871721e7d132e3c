"""Boxes and masks: clipping, IoU, xywh, run-length encoding, crop windows, other scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from models.instances import RLE, Instances


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip xyxy boxes (N, 4) to an image; float32, shape kept.

    >>> clip_boxes(np.array([[-5, 2, 30, 8]]), 6, 20).tolist()
    [[0.0, 2.0, 20.0, 6.0]]
    """
    clipped = np.asarray(boxes, dtype=np.float32).reshape(-1, 4).copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, width)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, height)
    return clipped


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


def rle_encode(mask: np.ndarray) -> RLE:
    """Encode a dense bool or uint8 mask (H, W) as COCO compressed RLE with text counts."""
    encoded = coco_mask.encode(np.asfortranarray(np.asarray(mask, dtype=np.uint8)))
    return rle_text(encoded)


def rle_decode(rle: RLE) -> np.ndarray:
    """Decode COCO RLE to a bool mask (H, W)."""
    return coco_mask.decode(rle_bytes(rle)).astype(bool)


def rle_text(rle: RLE) -> RLE:
    """The same RLE with plain ints and its counts as text (JSON form)."""
    counts = rle["counts"]
    return {
        "size": [int(v) for v in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def rle_bytes(rle: RLE) -> RLE:
    """The same RLE with its counts as bytes (pycocotools' form)."""
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.encode("ascii") if isinstance(counts, str) else counts}


def rle_area(rles: Sequence[RLE]) -> np.ndarray:
    """Areas in pixels of N RLE masks, int64 (N,)."""
    if not rles:
        return np.zeros(0, np.int64)
    return coco_mask.area([rle_bytes(r) for r in rles]).astype(np.int64)


def rle_boxes(rles: Sequence[RLE]) -> np.ndarray:
    """Tight boxes of N RLE masks, xyxy float32 (N, 4); zeros for an empty mask."""
    if not rles:
        return np.zeros((0, 4), np.float32)
    return xywh_to_xyxy(coco_mask.toBbox([rle_bytes(r) for r in rles]))


def rle_iou(a: Sequence[RLE], b: Sequence[RLE]) -> np.ndarray:
    """Intersection over union of masks of one image size, float64 (N, M)."""
    if not a or not b:
        return np.zeros((len(a), len(b)))
    return np.asarray(coco_mask.iou([rle_bytes(r) for r in a], [rle_bytes(r) for r in b], [0] * len(b)))


def rle_from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> RLE:
    """Union of COCO polygons ``[[x1, y1, ...], ...]`` as RLE, rasterised by pycocotools."""
    parts = coco_mask.frPyObjects([list(map(float, p)) for p in polygons], height, width)
    return rle_text(coco_mask.merge(parts))


def rle_paste(mask: np.ndarray, left: int, top: int, height: int, width: int) -> RLE:
    """RLE of a whole image (height, width) that is empty but for ``mask`` at (left, top).

    Works column by column on the crop: no dense mask of the image is made.
    COCO RLE counts runs down the columns, so only rows above and below the crop
    in its own columns, and the whole columns left and right of it, are added.

    >>> small = np.array([[1, 0], [1, 1]], dtype=bool)
    >>> rle_decode(rle_paste(small, 1, 1, 4, 4)).astype(int).tolist()
    [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    mask = np.asarray(mask, dtype=bool)
    rows, columns = mask.shape
    if left < 0 or top < 0 or left + columns > width or top + rows > height:
        raise ValueError(f"crop {columns}x{rows} at ({left}, {top}) leaves the image {width}x{height}")
    starts, lengths = mask_runs(mask.T, top, left, height)
    return rle_from_runs(starts, lengths, height, width)


def mask_runs(mask: np.ndarray, left: int, top: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs along the rows of an image ``width`` wide that is empty but for ``mask`` at (left, top).

    Returns:
        Starts, counted from 0 along the rows, and lengths, int64 (N,), ascending; a run
        goes on from the end of one row to the begin of the next.

    >>> [v.tolist() for v in mask_runs(np.array([[0, 1], [1, 1]]), 2, 0, 4)]
    [[3, 6], [1, 2]]
    """
    mask = np.asarray(mask, dtype=bool)
    rows, columns = mask.shape
    padded = np.zeros((rows, columns + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    row, edge = np.nonzero(np.diff(padded, axis=1))
    # Positions at which the value changes.
    changes = (row.astype(np.int64) + top) * width + left + edge
    # A run that reaches the end of one image row may go on at the begin of the next:
    # both changes then fall on one position and cancel out.
    if len(changes) > 1:
        same = np.flatnonzero(changes[1:] == changes[:-1])
        changes = np.delete(changes, np.concatenate([same, same + 1]))
    return changes[::2], changes[1::2] - changes[::2]


def rle_from_runs(starts: np.ndarray, lengths: np.ndarray, height: int, width: int) -> RLE:
    """RLE from ascending runs down the columns, counted from 0."""
    bounds = np.concatenate([[0], np.stack([starts, starts + lengths], axis=1).ravel(), [height * width]])
    counts = np.diff(bounds)
    # A mask that starts at pixel 0 already has its leading empty run of length 0; a
    # mask that ends at the last pixel must not get a trailing one.
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    uncompressed = {"size": [height, width], "counts": [int(v) for v in counts]}
    return rle_text(coco_mask.frPyObjects(uncompressed, height, width))


def rle_counts(rle: RLE) -> np.ndarray:
    """Lengths of the runs of a compressed RLE, int64 (N,): empty, mask, empty, ... down the columns.

    The format is that of pycocotools' ``rleToString``: groups of 5 bits with a
    continuation bit, from the third run on as the difference to the run two before.

    >>> rle_counts(rle_encode(np.array([[0, 1], [1, 1]]))).tolist()
    [1, 3]
    """
    counts = rle["counts"]
    codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    if not len(codes):
        return np.zeros(0, np.int64)
    last = (codes & 0x20) == 0
    group = np.concatenate([[0], np.cumsum(last)[:-1]])
    place = np.arange(len(codes)) - np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])[group]
    values = np.bincount(group, (codes & 0x1F) << (5 * place)).astype(np.int64)
    # The highest bit of the last group is the sign.
    negative = (codes[last] & 0x10) != 0
    values -= np.where(negative, np.int64(1) << (5 * (place[last] + 1)), 0)
    # Runs 1, 3, 5, ... and 2, 4, 6, ... are differences along themselves; run 0 stands alone.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def checked_rle(rle: Any, height: int, width: int) -> RLE:
    """A compressed RLE that came from outside, with text counts, if its runs fill an image of (height, width).

    pycocotools decodes runs that end early to whatever the memory holds.

    Raises:
        ValueError: of another size; no text of runs; a run of fewer than 0 pixels; more or fewer pixels than the image has.

    >>> checked_rle({"size": [2, 2], "counts": b"13"}, 2, 2)
    {'size': [2, 2], 'counts': '13'}
    """
    try:
        size = [int(v) for v in rle["size"]]
        counts = rle["counts"].decode("ascii") if isinstance(rle["counts"], bytes) else rle["counts"]
        codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except (KeyError, TypeError, AttributeError, OverflowError, UnicodeError):
        raise ValueError("no size and text of runs") from None
    if size != [height, width]:
        raise ValueError(f"RLE of size {size} in an image of [{height}, {width}]")
    whole = len(codes) > 0 and codes.min() >= 0 and codes.max() < 64 and codes[-1] < 32
    # Seven groups of 5 bits hold any number of pixels that an image may have.
    ends = np.flatnonzero(codes < 32)
    if not whole or np.diff(ends, prepend=-1).max() > 7:
        raise ValueError("its runs are damaged")
    runs = rle_counts({"size": size, "counts": counts})
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"its runs have {int(runs.sum())} pixels, the image has {height * width}")
    return {"size": size, "counts": counts}


def rle_crop(rle: RLE) -> tuple[np.ndarray, int, int]:
    """The mask's own part of the image: bool (h, w), left, top; 0 x 0 for an empty mask.

    Only that part is made dense.

    >>> part, left, top = rle_crop(rle_paste(np.array([[1, 0], [1, 1]]), 5, 7, 100, 100))
    >>> part.astype(int).tolist(), left, top
    ([[1, 0], [1, 1]], 5, 7)
    """
    height = int(rle["size"][0])
    counts = rle_counts(rle)
    ends = np.cumsum(counts)
    starts, lengths = (ends - counts)[1::2], counts[1::2]
    total = int(lengths.sum())
    if total == 0:
        return np.zeros((0, 0), bool), 0, 0
    pixels = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(total)
    columns, rows = np.divmod(pixels, height)
    left, top = int(columns.min()), int(rows.min())
    part = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), bool)
    part[rows - top, columns - left] = True
    return part, left, top


def rescaled(found: Instances, height: int, width: int) -> Instances:
    """What was found in an image, in pixels of the same image at another size, masks too."""
    if (height, width) == (found.height, found.width):
        return found
    scale = np.array([width / found.width, height / found.height] * 2)
    masks = None
    if found.masks is not None:
        masks = [rescaled_mask(rle, scale, height, width) for rle in found.masks]
    return Instances.make(
        found.image_id, height, width, clip_boxes(found.boxes * scale, height, width), found.scores, found.labels, masks
    )


def rescaled_mask(rle: RLE, scale: np.ndarray, height: int, width: int) -> RLE:
    """A mask in an image of another size; ``scale`` is new by old, (4,): x, y, x, y."""
    mask, left, top = rle_crop(rle)
    if not mask.size:
        return rle_paste(mask, 0, 0, height, width)
    bounds = np.array([left, top, left + mask.shape[1], top + mask.shape[0]]) * scale
    x1, y1, x2, y2 = clip_boxes(bounds.round(), height, width)[0].astype(int).tolist()
    if x2 <= x1 or y2 <= y1:
        return rle_paste(mask[:0, :0], 0, 0, height, width)
    smooth = cv2.resize(mask.astype(np.float32), (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)
    return rle_paste(smooth >= 0.5, x1, y1, height, width)
