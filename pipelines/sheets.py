"""A saved model over a data set: its evaluations, and a sheet of sample pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.instances import Instances
from models.predictor import load_model, read_spec
from pipelines import figures
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation import Evaluation, instance_ious
from pipelines.prediction import evaluate_predictions, is_segmenter, predict_image

# Solutions of the course evaluate at this score, which cuts the precision-recall curve short.
COURSE_THRESHOLD = 0.6


def evaluate_with_sheet(
    saved: Path, dataset: Dataset, device: str, samples: int = 3
) -> tuple[list[tuple[str, Evaluation]], np.ndarray | None]:
    """Predict a data set with a saved folder: its evaluations, and a sheet of the first samples, if any.

    Detections are evaluated a second time at the course's score threshold, prefixed ``at_0.6_``.
    """
    predictor, dataset = load_model(saved, device), dataset.rendered(read_spec(saved).rendering)
    shown: list[tuple[np.ndarray, Sample, Instances]] = []
    predictions = []
    for sample in dataset.samples:
        image = sample.read()
        found = predict_image(predictor, image, sample)
        predictions.append(found)
        if len(shown) < samples and len(sample.boxes):
            shown.append((image, sample, found))
    if not shown and len(dataset):
        # Images without planes show at least what was found there.
        shown.append((dataset.samples[0].read(), dataset.samples[0], predictions[0]))
    segmenter = is_segmenter(predictor)
    evaluations = evaluate_predictions(predictions, dataset, segmenter)
    if not segmenter:
        again = evaluate_predictions(predictions, dataset, segmenter, COURSE_THRESHOLD)
        evaluations += [(f"at_{COURSE_THRESHOLD:g}_{prefix}", e) for prefix, e in again]
    sheet = _crops(shown) if segmenter else figures.image_sheet(shown) if shown else None
    return evaluations, sheet


def _crops(shown: Sequence[tuple[np.ndarray, Sample, Instances]], most: int = 12) -> np.ndarray | None:
    rows = []
    for image, sample, found in shown:
        if not sample.has_masks or found.masks is None:
            continue
        one = Dataset("", sample.path, "", "", (sample,))
        for i, iou in zip(sample.outlined.tolist(), instance_ious(one, [found.masks]), strict=True):
            rows.append((image, sample.boxes[i], sample.masks[i], found.masks[i], float(iou)))
    return figures.crop_sheet(rows[:most]) if rows else None
