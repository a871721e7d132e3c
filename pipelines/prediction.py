"""A predictor over a data set: detectors see whole images, crop segmenters the annotated boxes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from models.errors import DataError
from models.instances import Instances
from models.predictor import Predictor
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation import Evaluation, evaluate_instances, evaluate_masks

# The number by which versions of a kind are compared.
MAIN_METRIC = {"detector": "AP", "segmenter": "IoU", "instance_segmenter": "mask_AP"}


def is_segmenter(predictor: Predictor) -> bool:
    """Whether the predictor needs boxes to segment in."""
    return hasattr(predictor, "masks_in_boxes")


def predict_image(predictor: Predictor, image: np.ndarray, sample: Sample) -> Instances:
    """Planes of one image, named by its id; a segmenter gets the annotated boxes, which score 1.

    Raises:
        DataError: a segmenter, but nothing is known about the image's planes.
    """
    if not is_segmenter(predictor):
        return predictor.predict([image])[0].named(sample.image_id)
    if not sample.truth:
        raise DataError(
            f"{sample.image_id}: this model segments planes in given boxes and the data has none; "
            "give data with annotations, or score a detector"
        )
    masks = predictor.masks_in_boxes([image], [sample.boxes])[0]  # type: ignore[attr-defined]
    ones = np.ones(len(sample.boxes))
    return Instances.make(sample.image_id, sample.height, sample.width, sample.boxes, ones, None, masks)


def predict_dataset(predictor: Predictor, dataset: Dataset) -> Iterator[Instances]:
    """Predict the images of a data set one after the other."""
    for sample in dataset.samples:
        yield predict_image(predictor, sample.read(), sample)


def evaluate_predictions(
    predictions: list[Instances], dataset: Dataset, segmenter: bool, score_threshold: float = 0.05
) -> list[tuple[str, Evaluation]]:
    """All numbers that the predictions allow, as (metric prefix, Evaluation).

    Boxes have no prefix, masks of detected planes ``mask_``; a crop segmenter is
    measured by the IoU in its boxes.
    """
    if segmenter:
        by_id = {p.image_id: list(p.masks or ()) for p in predictions}
        return [("", evaluate_masks(dataset, [by_id.get(s.image_id, []) for s in dataset.samples]))]
    results = [("", evaluate_instances(dataset, predictions, score_threshold=score_threshold))]
    if dataset.has_masks and predictions and all(p.masks is not None for p in predictions):
        results.append(("mask_", evaluate_instances(dataset, predictions, "segm", score_threshold)))
    return results
