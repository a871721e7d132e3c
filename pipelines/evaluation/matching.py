"""Predictions against truth, plane by plane: COCO's matching, AP under resampling, errors by kind.

Written out because the evaluators give sums only; tests hold it to pycocotools' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pycocotools import mask as coco_mask

from models.geometry.boxes import box_iou, xyxy_to_xywh
from models.geometry.rle import rle_bytes, rle_iou
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample

Kind = Literal["bbox", "segm"]

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETS = 100

# The kinds of TIDE (Bolya et al., ECCV 2020) that exist with one class, its background threshold,
# and one more for outlines.
ERRORS = ("missed", "false", "duplicate", "poorly localised", "poorly outlined")
BACKGROUND = 0.1


@dataclass(frozen=True)
class ImageMatch:
    """Detections of one image, best score first.

    Attributes:
        scores: (D,).
        correct: bool (10, D), a row for each IoU threshold.
        ignored: as ``correct``.
        planes: number of annotated planes, crowds left out.
    """

    scores: np.ndarray
    correct: np.ndarray
    ignored: np.ndarray
    planes: int


def match_image(sample: Sample, instances: Instances, kind: Kind = "bbox") -> ImageMatch:
    """COCO's greedy matching at its ten IoU thresholds, at most 100 detections."""
    sample = sample.for_masks() if kind == "segm" else sample
    count = min(len(instances), MAX_DETS)
    overlaps = _overlaps(sample, instances, count, kind)
    real, crowd = np.flatnonzero(~sample.crowd), np.flatnonzero(sample.crowd)
    correct, ignored = np.zeros((2, len(IOUS), count), bool)
    taken = np.zeros((len(IOUS), len(real)), bool)
    least = np.minimum(IOUS, 1 - 1e-10)
    for d in range(count):
        if len(real):
            free = np.where(taken, -1.0, overlaps[d, real][None, :])
            # Of equal overlaps COCO takes the last.
            best = len(real) - 1 - free[:, ::-1].argmax(axis=1)
            hit = free[np.arange(len(IOUS)), best] >= least
            taken[hit, best[hit]] = True
            correct[hit, d] = True
        if len(crowd):
            ignored[:, d] = ~correct[:, d] & (overlaps[d, crowd].max() >= least)
    return ImageMatch(instances.scores[:count].astype(np.float64), correct, ignored, len(real))


def _overlaps(sample: Sample, instances: Instances, count: int, kind: Kind) -> np.ndarray:
    if not count or not len(sample.boxes):
        return np.zeros((count, len(sample.boxes)))
    crowd = [int(c) for c in sample.crowd]
    if kind == "segm":
        masks = [rle_bytes(m) for m in (instances.masks or ())[:count]]
        return np.asarray(coco_mask.iou(masks, [rle_bytes(m) for m in sample.masks if m is not None], crowd))
    return np.asarray(coco_mask.iou(xyxy_to_xywh(instances.boxes[:count]), xyxy_to_xywh(sample.boxes), crowd))


class Ranked:
    """All detections of a data set in order of score, ready for AP under weights of images."""

    def __init__(self, matches: Sequence[ImageMatch]) -> None:
        scores = np.concatenate([m.scores for m in matches])
        order = np.argsort(-scores, kind="mergesort")
        self.scores = scores[order]
        self.image = np.repeat(np.arange(len(matches)), [len(m.scores) for m in matches])[order]
        self.correct = np.concatenate([m.correct for m in matches], axis=1)[:, order]
        ignored = np.concatenate([m.ignored for m in matches], axis=1)[:, order]
        self.wrong = ~self.correct & ~ignored
        self.planes = np.array([m.planes for m in matches], dtype=np.float64)

    def curve(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Precision at COCO's 101 recalls, (10, 101); ``weights`` (images,) count each image so often."""
        weights = np.ones(len(self.planes)) if weights is None else weights
        total = float(self.planes @ weights)
        result = np.zeros((len(IOUS), len(RECALLS)))
        if total == 0 or not len(self.image):
            return result
        each = weights[self.image]
        hits = np.cumsum(self.correct * each, axis=1)
        misses = np.cumsum(self.wrong * each, axis=1)
        precision = hits / (hits + misses + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row, (recall, values) in enumerate(zip(hits / total, precision, strict=True)):
            places = np.searchsorted(recall, RECALLS, side="left")
            inside = places < len(recall)
            result[row, inside] = values[places[inside]]
        return result

    def average_precision(self, weights: np.ndarray | None = None) -> float:
        """COCO's AP (mean over the IoU thresholds)."""
        return float(self.curve(weights).mean())


def rank(dataset: Dataset, predictions: Sequence[Instances], kind: Kind = "bbox") -> Ranked:
    """Match every image of a data set; images without an entry have no detections."""
    by_id = {p.image_id: p for p in predictions}
    empty = [Instances.empty(s.image_id, s.height, s.width, masks=True) for s in dataset.samples]
    return Ranked([match_image(s, by_id.get(s.image_id, e), kind) for s, e in zip(dataset.samples, empty, strict=True)])


def bootstrap_difference(
    first: Ranked, second: Ranked, *, resamples: int = 500, seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Interval of AP(second) - AP(first) over resampled images (percentile bootstrap, paired).

    None for a single image, which says nothing about others.
    """
    images = len(first.planes)
    if images < 2:
        return None
    differences = resampled(
        images,
        lambda weights: second.average_precision(weights) - first.average_precision(weights),
        resamples=resamples,
        seed=seed,
    )
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(differences, [tail, 100 - tail])
    return float(low), float(high)


def resampled(images: int, statistic: Callable[[np.ndarray], float], *, resamples: int = 500, seed: int = 0) -> np.ndarray:
    """A statistic over images drawn with replacement, float64 (resamples,).

    ``statistic`` gets how often each image was drawn, float64 (images,).
    """
    rng = np.random.default_rng(seed)
    draws = (rng.multinomial(images, np.full(images, 1 / images)).astype(np.float64) for _ in range(resamples))
    return np.array([statistic(weights) for weights in draws])


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on each detection and plane of one image at one score threshold.

    Attributes:
        detections: kind of each detection, "correct" or one of ERRORS.
        hit: indices of the planes that correct detections hit.
        missed: indices of the planes that no detection is near.
        overlaps: IoU of each correct detection with its plane.
    """

    detections: list[str]
    hit: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)
    overlaps: list[float] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Errors by kind, and the correct ones."""
        kinds = {kind: self.detections.count(kind) for kind in ("correct", *ERRORS)}
        return {**kinds, "missed": len(self.missed)}


def diagnose(sample: Sample, instances: Instances, masks: bool) -> Diagnosis:
    """Sort detections and planes by kind of error, at an IoU of 0.5.

    A detection that hits no free plane is a duplicate where it overlaps a plane that a
    better one has hit; poorly outlined where its box fits but its mask does not;
    poorly localised where it overlaps a plane by 0.1 or more; else false. A plane is
    missed where it is neither hit nor the nearest of a poorly localised or outlined one.
    """
    sample = sample.for_masks() if masks else sample
    real = np.flatnonzero(~sample.crowd)
    boxes = box_iou(instances.boxes, sample.boxes[real])
    overlaps = boxes
    if masks:
        overlaps = rle_iou(
            list(instances.masks or ()), [m for m, c in zip(sample.masks, sample.crowd, strict=True) if m and not c]
        )
    in_crowd = _in_crowd(sample, instances)
    kinds, hit, near, matched = [], set(), set(), []
    for d in range(len(instances)):
        free = [g for g in range(len(real)) if g not in hit]
        best = max(free, key=lambda g: overlaps[d, g], default=None)
        if best is not None and overlaps[d, best] >= 0.5:
            hit.add(best)
            matched.append(float(overlaps[d, best]))
            kinds.append("correct")
            continue
        nearest = int(boxes[d].argmax()) if len(real) else 0
        box, own = (float(boxes[d].max()), float(overlaps[d].max())) if len(real) else (0.0, 0.0)
        if own >= 0.5:
            kinds.append("duplicate")
        elif in_crowd[d]:
            kinds.append("in a crowd")
        elif box >= BACKGROUND:
            kinds.append("poorly outlined" if box >= 0.5 else "poorly localised")
            near.add(nearest)
        else:
            kinds.append("false")
    names = {int(g): int(real[g]) for g in range(len(real))}
    missed = {names[g] for g in names if g not in hit and g not in near}
    return Diagnosis(kinds, {names[g] for g in hit}, missed, matched)


def _in_crowd(sample: Sample, instances: Instances) -> np.ndarray:
    crowd = sample.boxes[sample.crowd]
    if not len(crowd) or not len(instances):
        return np.zeros(len(instances), bool)
    inside = np.asarray(coco_mask.iou(xyxy_to_xywh(instances.boxes), xyxy_to_xywh(crowd), [1] * len(crowd)))
    return inside.max(axis=1) >= 0.5


def disagreement(first: Instances, second: Instances, masks: bool) -> tuple[list[int], list[int]]:
    """Indices of the detections of each that the other has no counterpart for (IoU of 0.5 or more)."""
    overlaps = rle_iou(first.masks or (), second.masks or ()) if masks else box_iou(first.boxes, second.boxes)
    left, right = set(range(len(first))), set(range(len(second)))
    for a in range(len(first)):
        best = max(right, key=lambda b: overlaps[a, b], default=None)
        if best is not None and overlaps[a, best] >= 0.5:
            left.discard(a)
            right.discard(best)
    return sorted(left), sorted(right)
