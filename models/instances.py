"""The one result type: planes found in one image, and the table made from it.

Conventions, valid everywhere: an image is RGB uint8 (H, W, 3); a box is xyxy
float32 in absolute pixels of the original image; a mask is COCO compressed RLE
of the original image size, ``{"size": [H, W], "counts": str}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RLE = dict[str, Any]

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


@dataclass(frozen=True)
class Instances:
    """Planes of one image, best score first.

    boxes: (N, 4) float32 xyxy pixels; scores: (N,) float32, descending;
    labels: (N,) int64, 0-based index into the model's class list; masks: N RLE
    or None where the predictor makes none. ``height`` and ``width`` are those of
    the original image.

    >>> Instances.make("a", 10, 20, [[1, 2, 3, 4], [0, 0, 5, 5]], [0.1, 0.9]).scores.tolist()
    [0.8999999761581421, 0.10000000149011612]
    """

    image_id: str
    height: int
    width: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[RLE, ...] | None = None

    @classmethod
    def make(
        cls,
        image_id: str,
        height: int,
        width: int,
        boxes: Any,
        scores: Any,
        labels: Any = None,
        masks: Sequence[RLE] | None = None,
    ) -> Instances:
        """Build from array-likes: converts dtypes and sorts by descending score (stable)."""
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(scores, dtype=np.float32).reshape(-1)
        labels = np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels, dtype=np.int64).reshape(-1)
        if not len(boxes) == len(scores) == len(labels):
            raise ValueError(f"boxes, scores, labels differ in length: {len(boxes)}, {len(scores)}, {len(labels)}")
        if masks is not None and len(masks) != len(boxes):
            raise ValueError(f"masks and boxes differ in length: {len(masks)}, {len(boxes)}")
        order = np.argsort(-scores, kind="stable")
        return cls(
            image_id,
            int(height),
            int(width),
            boxes[order],
            scores[order],
            labels[order],
            None if masks is None else tuple(masks[i] for i in order),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def named(self, image_id: str) -> Instances:
        """The same instances under another image id."""
        return Instances(image_id, self.height, self.width, self.boxes, self.scores, self.labels, self.masks)

    def above(self, score: float) -> Instances:
        """Only the instances whose score is at least ``score``."""
        return self.take(np.flatnonzero(self.scores >= score))

    def take(self, index: np.ndarray) -> Instances:
        """The instances at ``index``, int64 (K,), which must keep their order."""
        masks = None if self.masks is None else tuple(self.masks[i] for i in index)
        boxes, scores, labels = self.boxes[index], self.scores[index], self.labels[index]
        return Instances(self.image_id, self.height, self.width, boxes, scores, labels, masks)


def to_rows(instances: Iterable[Instances]) -> list[dict[str, Any]]:
    """Rows of the instance table (``TABLE_COLUMNS``), one per plane, in order."""
    rows = []
    for found in instances:
        for i in range(len(found)):
            x1, y1, x2, y2 = (float(v) for v in found.boxes[i])
            mask = None if found.masks is None else found.masks[i]
            rows.append(
                {
                    "image_id": found.image_id,
                    "instance": i,
                    "x1": x1,
                    "y1": y1,
                    "x2": x2,
                    "y2": y2,
                    "score": float(found.scores[i]),
                    "label": int(found.labels[i]),
                    "height": found.height,
                    "width": found.width,
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
        has_masks = all(_present(row["mask_counts"]) for row in group)
        masks = (
            [{"size": [int(v) for v in row["mask_size"]], "counts": row["mask_counts"]} for row in group]
            if has_masks
            else None
        )
        result.append(
            Instances.make(
                image_id,
                group[0]["height"],
                group[0]["width"],
                [[row["x1"], row["y1"], row["x2"], row["y2"]] for row in group],
                [row["score"] for row in group],
                [row["label"] for row in group],
                masks,
            )
        )
    return result


def _present(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and len(value) > 0


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
