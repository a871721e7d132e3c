"""Versions measured on the same images at the same time: predictions, metrics, seconds, slices, resampled gains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import DataError, RecipeError
from models.geometry.rle import checked_rle, rle_area
from models.images.rendering import Rendering
from models.instances import Instances, from_rows, to_rows
from models.predictor import Predictor
from pipelines.data.dataset import Dataset
from pipelines.evaluation.inference import evaluate_predictions, is_segmenter, predict_images
from pipelines.evaluation.matching import IOUS, Ranked, rank, resampled
from pipelines.evaluation.metrics import SIZE_CLASSES, Evaluation, instance_ious
from pipelines.progress import Progress

SCORE = 0.05


@dataclass(frozen=True)
class Measurement:
    """One version on one data set: all metrics, the predictions, and the seconds that each image took.

    failed: image id -> why it could not be read or predicted; such an image counts as one without
    detections, and its seconds are NaN.
    """

    dataset: Dataset
    segmenter: bool
    predictions: list[Instances]
    seconds: list[float]
    metrics: dict[str, float] = field(default_factory=dict)
    failed: Mapping[str, DataError] = field(default_factory=dict)

    @property
    def evaluation(self) -> Evaluation:
        """The metrics with the settings they were made at."""
        settings = {"score_threshold": SCORE, "digest": self.dataset.digest(), "split": self.dataset.split}
        settings |= {"data": self.dataset.name, "images": len(self.dataset), "images_failed": len(self.failed)}
        return Evaluation({**self.metrics, "images_failed": float(len(self.failed))}, settings)

    def at(self, metric: str) -> float:
        """A metric's value, NaN where there is no truth for it.

        Raises:
            RecipeError: this kind of model has no such metric.
        """
        if metric not in self.metrics:
            if metric.startswith("mask_") and metric.removeprefix("mask_") in self.metrics and not self.dataset.has_masks:
                return math.nan
            raise RecipeError(f"metric {metric}: not known here; known: {', '.join(self.metrics)}")
        return self.metrics[metric]

    def of_size(self, size: str, main: str) -> float:
        """The main metric over planes of one of COCO's size classes, NaN where there are none."""
        if not self.segmenter:
            return self.at(f"{main}{size[0]}")
        masks = {p.image_id: list(p.masks or ()) for p in self.predictions}
        ious = instance_ious(self.dataset, [masks.get(s.image_id, []) for s in self.dataset.samples])
        planes = [m for s in self.dataset.samples for m, c in zip(s.masks, s.crowd, strict=True) if m is not None and not c]
        areas = np.array([float(rle_area([m])[0]) for m in planes])
        low, high = SIZE_CLASSES[size]
        chosen = (areas >= low) & (areas < high)
        return float(ious[chosen].mean()) if chosen.any() else math.nan

    def of_images(self, pattern: str, main: str) -> float:
        """The main metric over the images whose name fits a pattern (``A00*``), NaN where there are none."""
        names = [s.image_id for s in self.dataset.samples if fnmatch(s.image_id, pattern)]
        subset = self.dataset.subset(names, self.dataset.split)
        masks = main.startswith("mask_")
        if not subset.planes or (masks and not subset.has_masks):
            return math.nan
        by_id = {p.image_id: p for p in self.predictions}
        # An image that failed counts as one without detections.
        empty = [Instances.empty(s.image_id, s.height, s.width, masks=masks) for s in subset.samples]
        return all_metrics([by_id.get(e.image_id, e) for e in empty], subset, self.segmenter).get(main, math.nan)


def all_metrics(predictions: list[Instances], dataset: Dataset, segmenter: bool) -> dict[str, float]:
    """Every metric that predictions and truth allow, masks of detected planes prefixed ``mask_``."""
    evaluations = evaluate_predictions(predictions, dataset, segmenter, score_threshold=SCORE)
    return {prefix + name: value for prefix, e in evaluations for name, value in e.metrics.items()}


def measure(
    predictors: Mapping[str, Predictor],
    dataset: Dataset,
    progress: Progress,
    *,
    kept: Path | None = None,
    renderings: Mapping[str, Rendering] | None = None,
) -> dict[str, Measurement]:
    """Predict every image with every version, one after the other, so that a busy machine slows all of them.

    An image that a version cannot take, or that cannot be read, fails for that version alone.

    Args:
        kept: file in which results are kept image by image; a measurement that was
            interrupted goes on from it.
        renderings: how each version reads image files, by label; the data set's own without it.

    Raises:
        DataError: a version could predict no image at all.
        Exception: a version cannot work at all.
    """
    known = _read_kept(kept) if kept else {}
    failed: dict[str, dict[str, DataError]] = {label: {} for label in predictors}
    samples = progress(dataset.samples, len(dataset), f"evaluating {' and '.join(predictors)}")
    for label, sample, _, outcome, seconds in predict_images(predictors, samples, renderings=renderings, known=known):
        if isinstance(outcome, DataError):
            # Not kept: a call that goes on from here tries again.
            failed[label][sample.image_id] = outcome
            continue
        known[label, sample.image_id] = outcome, seconds
        if kept:
            _keep(kept, label, outcome, seconds)
    return {k: _measured(k, is_segmenter(p), dataset=dataset, known=known, failed=failed[k]) for k, p in predictors.items()}


def _measured(
    label: str,
    segmenter: bool,
    dataset: Dataset,
    known: Mapping[tuple[str, str], tuple[Instances, float]],
    failed: Mapping[str, DataError],
) -> Measurement:
    """The measurement of one version, of its results by (label, image id)."""
    results = [known.get((label, s.image_id)) for s in dataset.samples]
    predictions = [result[0] for result in results if result is not None]
    if not predictions and failed:
        first = next(iter(failed.values()))
        raise DataError(f"{label}: none of {len(dataset)} images could be predicted; the first: {first}")
    seconds = [math.nan if result is None else result[1] for result in results]
    metrics = all_metrics(predictions, dataset, segmenter)
    return Measurement(dataset, segmenter, predictions, seconds, metrics=metrics, failed=failed)


def _keep(kept: Path, label: str, instances: Instances, seconds: float) -> None:
    size = [instances.image_id, instances.height, instances.width, instances.masks is not None]
    line = json.dumps([label, seconds, size, to_rows([instances])])
    with open(kept, "a", encoding="utf-8") as handle:
        handle.write(line + "\n")


def _read_kept(kept: Path) -> dict[tuple[str, str], tuple[Instances, float]]:
    kept.parent.mkdir(parents=True, exist_ok=True)
    known: dict[tuple[str, str], tuple[Instances, float]] = {}
    lines = kept.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if kept.exists() else []
    for line in lines:
        # The last line may have been cut by a kill.
        if not line.endswith("\n"):
            continue
        try:
            label, seconds, (image_id, height, width, masks), rows = json.loads(line)
            instances = from_rows(rows)[0] if rows else Instances.empty(image_id, height, width, masks=masks)
            for mask in instances.masks or ():
                checked_rle(mask, height, width)
        except (ValueError, TypeError, KeyError):
            # Damaged, so predicted again.
            continue
        known[label, image_id] = instances, float(seconds)
    if lines and not lines[-1].endswith("\n"):
        kept.write_text("".join(lines[:-1]), encoding="utf-8")
    return known


def slowdown(candidate: Measurement, baseline: Measurement) -> float:
    """How many times as long the candidate takes: median over images, the first (warming up) left out.

    Images that failed for one of the two say nothing; NaN where no other is left.
    """
    ratios = np.array(candidate.seconds) / np.array(baseline.seconds)
    ratios = ratios[np.isfinite(ratios)]
    return float(np.median(ratios[1 if len(ratios) > 1 else 0 :])) if len(ratios) else math.nan


def gain_confidence(metric: str, least: float, candidate: Measurement, baseline: Measurement) -> float:
    """Share of resampled sets of images on which the candidate gains more than ``least``; NaN for a single image.

    Paired bootstrap over images, 500 resamples (Efron and Tibshirani 1993, chapter 16).

    Raises:
        RecipeError: a metric that cannot be resampled.
    """
    dataset = candidate.dataset
    if len(dataset) < 2:
        return math.nan
    ours, theirs = (_statistic(metric, m) for m in (candidate, baseline))
    gains = resampled(len(dataset), lambda weights: ours(weights) - theirs(weights))
    return float((gains > least).mean())


def _statistic(metric: str, of: Measurement) -> Callable[[np.ndarray], float]:
    """A metric as a function of how often each image counts."""
    if of.segmenter and metric in ("IoU", "Dice"):
        masks = {p.image_id: list(p.masks or ()) for p in of.predictions}
        each = [instance_ious(of.dataset.subset([s.image_id], ""), [masks.get(s.image_id, [])]) for s in of.dataset.samples]
        values = [2 * v / (1 + v) if metric == "Dice" else v for v in each]
        sums, counts = np.array([v.sum() for v in values]), np.array([float(len(v)) for v in values])
        return lambda weights: float(sums @ weights / max(counts @ weights, 1.0))
    rows: dict[str, Any] = {"AP": slice(None), "AP50": 0, "AP75": int(np.flatnonzero(np.isclose(IOUS, 0.75))[0])}
    plain = metric.removeprefix("mask_")
    if of.segmenter or plain not in rows:
        raise RecipeError(f"metric {metric}: no confidence can be computed; only for AP, AP50, AP75, IoU and Dice")
    predictions = [p.above(SCORE) for p in of.predictions]
    ranked: Ranked = rank(of.dataset, predictions, "segm" if metric.startswith("mask_") else "bbox")
    return lambda weights: float(ranked.curve(weights)[rows[plain]].mean())
