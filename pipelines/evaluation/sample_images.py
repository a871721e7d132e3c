"""A saved model over a data set: its evaluations, and sample pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.instances import Instances
from models.loading import load_model
from models.saved.spec import read_spec
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.drawing import crop_sheet, image_sheet
from pipelines.evaluation.inference import evaluate_predictions, is_segmenter, predict_dataset
from pipelines.evaluation.metrics import Evaluation, instance_ious
from pipelines.evaluation.sample_pictures import SamplePictures

# Solutions of the course evaluate at this score, which cuts the precision-recall curve short.
COURSE_THRESHOLD = 0.6


class Evaluated(NamedTuple):
    """What came of a data set.

    Attributes:
        evaluations: with the prefix of their metrics; detections a second time at the course's score threshold, prefixed
            ``at_0.6_``.
        sheet: of the first samples, RGB uint8 (H, W, 3), if there are any.
        predictions: in the data set's order, of failed images none.
        pictures: of samples spread over the data set, by name, see `SamplePictures`.
    """

    evaluations: list[tuple[str, Evaluation]]
    sheet: np.ndarray | None
    predictions: list[Instances]
    pictures: dict[str, np.ndarray]


def evaluate_with_sheet(saved: Path, dataset: Dataset, device: str, *, name: str = "test", samples: int = 3) -> Evaluated:
    """Predict a data set, which pictures call ``name``, with a saved folder; ``samples`` of its images are in the sheet."""
    predictor, dataset = load_model(saved, device), dataset.rendered(read_spec(saved).rendering)
    segmenter = is_segmenter(predictor)
    pictures = SamplePictures(dataset, crops=segmenter, name=f"{name}_sample")
    shown: list[tuple[np.ndarray, Sample, Instances]] = []

    def show(image: np.ndarray, sample: Sample, instances: Instances) -> None:
        # Images without planes are shown only where there are no others.
        if shown and not len(shown[0][1].boxes) and len(sample.boxes):
            shown.clear()
        if not shown or (len(shown) < samples and len(sample.boxes)):
            shown.append((image, sample, instances))
        pictures(image, sample, instances)

    predictions = predict_dataset(predictor, dataset, show)
    evaluations = evaluate_predictions(predictions.instances, dataset, segmenter, failed=predictions.failed)
    for message in list(predictions.failed.values())[:1]:
        logging.getLogger(__name__).warning(
            "%s/%s: %d of %d images failed and count as images without detections (first: %s)",
            *(dataset.name, dataset.split, len(predictions.failed), len(dataset), message),
        )
    if not segmenter:
        # The number of failed images stands in the first evaluations.
        again = evaluate_predictions(predictions.instances, dataset, segmenter, score_threshold=COURSE_THRESHOLD)
        evaluations += [(f"at_{COURSE_THRESHOLD:g}_{prefix}", e) for prefix, e in again]
    sheet = _crops(shown) if segmenter else image_sheet(shown) if shown else None
    return Evaluated(evaluations, sheet, predictions.instances, pictures.take())


def _crops(shown: Sequence[tuple[np.ndarray, Sample, Instances]], most: int = 12) -> np.ndarray | None:
    rows = []
    for image, sample, instances in shown:
        if not sample.has_masks or instances.masks is None:
            continue
        one = Dataset("", sample.path, "", "", (sample,))
        for i, iou in zip(sample.outlined.tolist(), instance_ious(one, [instances.masks]), strict=True):
            rows.append((image, sample.boxes[i], sample.masks[i], instances.masks[i], float(iou)))
    return crop_sheet(rows[:most]) if rows else None
