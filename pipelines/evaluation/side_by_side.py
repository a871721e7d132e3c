"""Versions measured on the same images at the same time: predictions, metrics, seconds, slices, resampled gains."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from pipelines.evaluation.inference import evaluate_predictions, image_failure, is_segmenter, predict_image
from pipelines.evaluation.matching import IOUS, Ranked, rank, resampled
from pipelines.evaluation.metrics import Evaluation, instance_ious
from pipelines.progress import Progress

SCORE = 0.05
# COCO's size classes, by the area of a plane in pixels.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}

# Shows how far a loop over so many items is: (items, number, title) -> the items.


@dataclass(frozen=True)
class Measurement:
    """One version on one data set: all metrics, what was found, and the seconds that each image took.

    failed: image id -> why it could not be read or predicted; such an image counts as one without
    detections, and its seconds are NaN.
    """

    dataset: Dataset
    segmenter: bool
    found: list[Instances]
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
        masks = {f.image_id: list(f.masks or ()) for f in self.found}
        ious = instance_ious(self.dataset, [masks.get(s.image_id, []) for s in self.dataset.samples])
        planes = [m for s in self.dataset.samples for m, c in zip(s.masks, s.crowd, strict=True) if m is not None and not c]
        areas = np.array([float(rle_area([m])[0]) for m in planes])
        low, high = SIZES[size]
        chosen = (areas >= low) & (areas < high)
        return float(ious[chosen].mean()) if chosen.any() else math.nan

    def of_images(self, pattern: str, main: str) -> float:
        """The main metric over the images whose name fits a pattern (``A00*``), NaN where there are none."""
        names = [s.image_id for s in self.dataset.samples if fnmatch(s.image_id, pattern)]
        part = self.dataset.subset(names, self.dataset.split)
        masks = main.startswith("mask_")
        if not part.planes or (masks and not part.has_masks):
            return math.nan
        found = {f.image_id: f for f in self.found}
        # Nothing is found in an image that failed.
        nothing = [Instances.empty(s.image_id, s.height, s.width, masks=masks) for s in part.samples]
        return all_metrics([found.get(n.image_id, n) for n in nothing], part, self.segmenter).get(main, math.nan)


def all_metrics(found: list[Instances], dataset: Dataset, segmenter: bool) -> dict[str, float]:
    """Every metric that predictions and truth allow, masks of detected planes prefixed ``mask_``."""
    return {p + k: v for p, e in evaluate_predictions(found, dataset, segmenter, SCORE) for k, v in e.metrics.items()}


def measure(
    predictors: Mapping[str, Predictor],
    dataset: Dataset,
    progress: Progress,
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
    labels = list(predictors)
    title = f"evaluating {' and '.join(labels)}"
    for number, sample in enumerate(progress(dataset.samples, len(dataset), title)):
        images: dict[Rendering, np.ndarray] = {}
        # Who comes first finds colder caches: they take turns.
        for label in labels if number % 2 else labels[::-1]:
            if (label, sample.image_id) in known:
                continue
            rendering = (renderings or {}).get(label, sample.rendering)
            try:
                if rendering not in images:
                    images[rendering] = replace(sample, rendering=rendering).read()
                started = time.perf_counter()
                found = predict_image(predictors[label], images[rendering], sample)
            except Exception as error:
                failure = image_failure(error, predictors[label], sample)
                if failure is None:
                    raise
                # Not kept: a call that goes on from here tries again.
                failed[label][sample.image_id] = failure
                continue
            known[label, sample.image_id] = found, time.perf_counter() - started
            if kept:
                _keep(kept, label, *known[label, sample.image_id])
    return {k: _measured(k, is_segmenter(p), dataset, known, failed[k]) for k, p in predictors.items()}


def _measured(
    label: str,
    segmenter: bool,
    dataset: Dataset,
    known: Mapping[tuple[str, str], tuple[Instances, float]],
    failed: Mapping[str, DataError],
) -> Measurement:
    """The measurement of one version, of its results by (label, image id)."""
    results = [known.get((label, s.image_id)) for s in dataset.samples]
    found = [result[0] for result in results if result is not None]
    if not found and failed:
        first = next(iter(failed.values()))
        raise DataError(f"{label}: none of {len(dataset)} images could be predicted; the first: {first}")
    seconds = [math.nan if result is None else result[1] for result in results]
    return Measurement(dataset, segmenter, found, seconds, all_metrics(found, dataset, segmenter), failed)


def _keep(kept: Path, label: str, found: Instances, seconds: float) -> None:
    size = [found.image_id, found.height, found.width, found.masks is not None]
    line = json.dumps([label, seconds, size, to_rows([found])])
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
            found = Instances.empty(image_id, height, width, masks=masks)
            found = from_rows(rows)[0] if rows else found
            for mask in found.masks or ():
                checked_rle(mask, height, width)
        except (ValueError, TypeError, KeyError):
            # Damaged, so predicted again.
            continue
        known[label, image_id] = found, float(seconds)
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
        masks = {f.image_id: list(f.masks or ()) for f in of.found}
        each = [instance_ious(of.dataset.subset([s.image_id], ""), [masks.get(s.image_id, [])]) for s in of.dataset.samples]
        values = [2 * v / (1 + v) if metric == "Dice" else v for v in each]
        sums, counts = np.array([v.sum() for v in values]), np.array([float(len(v)) for v in values])
        return lambda weights: float(sums @ weights / max(counts @ weights, 1.0))
    rows: dict[str, Any] = {"AP": slice(None), "AP50": 0, "AP75": int(np.flatnonzero(np.isclose(IOUS, 0.75))[0])}
    plain = metric.removeprefix("mask_")
    if of.segmenter or plain not in rows:
        raise RecipeError(f"metric {metric}: no confidence can be computed; only for AP, AP50, AP75, IoU and Dice")
    found = [f.above(SCORE) for f in of.found]
    ranked: Ranked = rank(of.dataset, found, "segm" if metric.startswith("mask_") else "bbox")
    return lambda weights: float(ranked.curve(weights)[rows[plain]].mean())
