"""Masks as COCO run-length encoding: encoding, decoding, checking, cropping and pasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from models.geometry.boxes import xywh_to_xyxy
from models.instances import RLE


class CropMask(NamedTuple):
    """A mask in its own part of an image, so that no dense mask of the whole image is needed.

    mask: bool (h, w); left, top: its upper left corner in the image, whole pixels. An empty mask is 0 x 0 at (0, 0).
    """

    mask: np.ndarray
    left: int
    top: int


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
    rles = coco_mask.frPyObjects([list(map(float, p)) for p in polygons], height, width)
    return rle_text(coco_mask.merge(rles))


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
    except (KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError("no size and text of runs") from error
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


def rle_crop(rle: RLE) -> CropMask:
    """Crop a mask to its tight box; only that part is made dense.

    >>> crop = rle_crop(rle_paste(np.array([[1, 0], [1, 1]]), 5, 7, 100, 100))
    >>> crop.mask.astype(int).tolist(), crop.left, crop.top
    ([[1, 0], [1, 1]], 5, 7)
    """
    height = int(rle["size"][0])
    counts = rle_counts(rle)
    ends = np.cumsum(counts)
    starts, lengths = (ends - counts)[1::2], counts[1::2]
    total = int(lengths.sum())
    if total == 0:
        return CropMask(np.zeros((0, 0), bool), 0, 0)
    pixels = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(total)
    columns, rows = np.divmod(pixels, height)
    left, top = int(columns.min()), int(rows.min())
    mask = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), bool)
    mask[rows - top, columns - left] = True
    return CropMask(mask, left, top)
