"""The one result type: the planes detected in one image, and the table made from it.

Conventions, valid everywhere: an image is RGB uint8 (H, W, 3); a box is xyxy
float32 in absolute pixels of the original image; a mask is COCO compressed RLE
of the original image size, ``{"size": [H, W], "counts": str}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np


class RLE(TypedDict):
    """A mask as COCO compressed run-length encoding, runs down the columns.

    size: [height, width] of the image in pixels; counts: the runs as text, or as bytes where pycocotools made them.
    """

    size: list[int]
    counts: str | bytes


BOX, LABEL = np.dtype(np.float32), np.dtype(np.int64)

TABLE_COLUMNS = (
    "image_id",
    "instance",
    "x1",
    "y1",
    "x2",
    "y2",
    "score",
    "label",
    "height",
    "width",
    "mask_size",
    "mask_counts",
)


# Equality compares what the arrays hold, which dataclass's own cannot.
@dataclass(frozen=True, eq=False)
class Instances:
    """Planes of one image, best score first; checked when made.

    `make` converts and sorts; use it where that may be needed.

    Attributes:
        image_id: of the image.
        height: of the original image, in pixels.
        width: of the original image, in pixels.
        boxes: (N, 4) float32, xyxy pixels.
        scores: (N,) float32, descending.
        labels: (N,) int64, index into the model's class list, from 0.
        masks: N RLE of the image's size; None where the predictor makes none.

    Two of them are equal where all fields are, arrays and masks by their content (NaN equals
    NaN, text counts equal the same counts as bytes). They have no hash, as arrays have none.

    Raises:
        ValueError: another dtype or shape, lengths that differ, scores that rise, or a mask of another size.

    >>> best_first = Instances.make("a", 10, 20, [[1, 2, 3, 4], [0, 0, 5, 5]], [0.1, 0.9])
    >>> best_first.scores.tolist()
    [0.8999999761581421, 0.10000000149011612]
    >>> best_first == best_first.take(np.array([0, 1])), best_first == best_first.above(0.5)
    (True, False)
    """

    image_id: str
    height: int
    width: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[RLE, ...] | None = None

    def __post_init__(self) -> None:
        """Check dtypes, shapes, lengths, sizes and order of the fields; the order of scores that are NaN is left alone."""
        count = len(self.scores) if np.ndim(self.scores) else 0
        for name, dtype, shape in (("boxes", BOX, (count, 4)), ("scores", BOX, (count,)), ("labels", LABEL, (count,))):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                raise ValueError(f"image {self.image_id!r}: {name} are {_form(array)}, expected {dtype} {shape}")
        if (self.scores[1:] > self.scores[:-1]).any():
            raise ValueError(f"image {self.image_id!r}: scores rise, expected the best first (Instances.make sorts)")
        if self.masks is None:
            return
        if not isinstance(self.masks, tuple) or len(self.masks) != count:
            raise ValueError(f"image {self.image_id!r}: masks are {_form(self.masks)}, expected a tuple of {count}")
        size = [self.height, self.width]
        for i, mask in enumerate(self.masks):
            if not isinstance(mask, dict) or list(mask["size"]) != size:
                form = f"an RLE of size {list(mask['size'])}" if isinstance(mask, dict) else type(mask).__name__
                raise ValueError(f"image {self.image_id!r}: mask {i} is {form}, expected an RLE of size {size}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Instances):
            return NotImplemented
        mine, theirs = (self.image_id, self.height, self.width), (other.image_id, other.height, other.width)
        return (
            mine == theirs
            and np.array_equal(self.boxes, other.boxes, equal_nan=True)
            and np.array_equal(self.scores, other.scores, equal_nan=True)
            and np.array_equal(self.labels, other.labels)
            and _equal_masks(self.masks, other.masks)
        )

    @classmethod
    def make(
        cls,
        image_id: str,
        height: int,
        width: int,
        boxes: Any,
        scores: Any,
        *,
        labels: Any = None,
        masks: Sequence[RLE] | None = None,
    ) -> Instances:
        """Build from array-likes: converts dtypes and sorts by descending score (stable).

        Raises:
            ValueError: lengths that differ, or a mask of another size than the image.
        """
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(scores, dtype=np.float32).reshape(-1)
        labels = np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels, dtype=np.int64).reshape(-1)
        if not len(boxes) == len(scores) == len(labels):
            raise ValueError(f"boxes, scores, labels differ in length: {len(boxes)}, {len(scores)}, {len(labels)}")
        if masks is not None and len(masks) != len(boxes):
            raise ValueError(f"masks and boxes differ in length: {len(masks)}, {len(boxes)}")
        order = np.argsort(-scores, kind="stable")
        return cls(
            image_id=image_id,
            height=int(height),
            width=int(width),
            boxes=boxes[order],
            scores=scores[order],
            labels=labels[order],
            masks=None if masks is None else tuple(masks[i] for i in order),
        )

    @classmethod
    def empty(cls, image_id: str, height: int, width: int, *, masks: bool = False) -> Instances:
        """An image without planes; ``masks``: of a predictor that makes masks.

        >>> len(Instances.empty("a", 10, 20)), Instances.empty("a", 10, 20, masks=True).masks
        (0, ())
        """
        return cls.make(image_id, height, width, boxes=[], scores=[], labels=[], masks=[] if masks else None)

    def __len__(self) -> int:
        return len(self.boxes)

    def named(self, image_id: str) -> Instances:
        """The same instances under another image id."""
        return replace(self, image_id=image_id)

    def above(self, score: float) -> Instances:
        """Only the instances whose score is at least ``score``."""
        return self.take(np.flatnonzero(self.scores >= score))

    def take(self, index: np.ndarray) -> Instances:
        """The instances at ``index``, int64 (K,), which must keep their order."""
        masks = None if self.masks is None else tuple(self.masks[i] for i in index)
        boxes, scores, labels = self.boxes[index], self.scores[index], self.labels[index]
        return replace(self, boxes=boxes, scores=scores, labels=labels, masks=masks)


def to_rows(instances: Iterable[Instances]) -> list[dict[str, Any]]:
    """Rows of the instance table (``TABLE_COLUMNS``), one per plane, in order."""
    rows = []
    for detections in instances:
        for i in range(len(detections)):
            x1, y1, x2, y2 = (float(v) for v in detections.boxes[i])
            mask = None if detections.masks is None else detections.masks[i]
            rows.append(
                {
                    "image_id": detections.image_id,
                    "instance": i,
                    "x1": x1,
                    "y1": y1,
                    "x2": x2,
                    "y2": y2,
                    "score": float(detections.scores[i]),
                    "label": int(detections.labels[i]),
                    "height": detections.height,
                    "width": detections.width,
                    "mask_size": None if mask is None else [int(v) for v in mask["size"]],
                    "mask_counts": None if mask is None else _text(mask["counts"]),
                }
            )
    return rows


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Instances]:
    """Inverse of `to_rows` for images with at least one plane, in order of first appearance."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(str(row["image_id"]), []).append(row)
    result = []
    for image_id, group in grouped.items():
        masks: list[RLE] | None = None
        if all(_present(row["mask_counts"]) for row in group):
            masks = [{"size": [int(v) for v in row["mask_size"]], "counts": row["mask_counts"]} for row in group]
        result.append(
            Instances.make(
                image_id,
                height=group[0]["height"],
                width=group[0]["width"],
                boxes=[[row["x1"], row["y1"], row["x2"], row["y2"]] for row in group],
                scores=[row["score"] for row in group],
                labels=[row["label"] for row in group],
                masks=masks,
            )
        )
    return result


def _present(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and len(value) > 0


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _form(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__


def _equal_masks(a: Sequence[RLE] | None, b: Sequence[RLE] | None) -> bool:
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(
        list(x["size"]) == list(y["size"]) and _text(x["counts"]) == _text(y["counts"]) for x, y in zip(a, b, strict=True)
    )
