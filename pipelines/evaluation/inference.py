"""A predictor over a data set: detectors see whole images, crop segmenters the annotated boxes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeGuard

import numpy as np

from models.errors import DataError, PlanesError, one_line
from models.images.rendering import Rendering
from models.instances import Instances
from models.predictor import BoxSegmenter, Predictor
from models.runtime.out_of_memory import out_of_memory
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.metrics import Evaluation, evaluate_instances, evaluate_masks

# The number by which versions of a kind are compared.
MAIN_METRIC = {"detector": "AP", "segmenter": "IoU", "instance_segmenter": "mask_AP"}


def is_segmenter(predictor: object) -> TypeGuard[BoxSegmenter]:
    """Whether the predictor needs boxes to segment in."""
    return isinstance(predictor, BoxSegmenter)


def predict_image(predictor: Predictor | BoxSegmenter, image: np.ndarray, sample: Sample) -> Instances:
    """Predict one image, named by its id; a segmenter gets the annotated boxes, which score 1.

    Raises:
        DataError: a segmenter, but nothing is known about the image's planes.
    """
    if not isinstance(predictor, BoxSegmenter):
        return predictor.predict([image])[0].named(sample.image_id)
    if not sample.truth:
        raise DataError(
            f"{sample.image_id}: this model segments planes in given boxes and the data has none; "
            "give data with annotations, or score a detector"
        )
    masks = predictor.masks_in_boxes([image], [sample.boxes])[0]
    ones = np.ones(len(sample.boxes))
    return Instances.make(sample.image_id, sample.height, sample.width, sample.boxes, ones, masks=masks)


def image_failure(error: Exception, predictor: Predictor, sample: Sample) -> DataError | None:
    """An error of reading or predicting an image as one that names the image, if it may be the image's fault.

    None where the model cannot work at all, or the GPU is broken: whatever comes after would fail too.
    """
    path = str(sample.path)
    if isinstance(error, PlanesError):
        # A crop segmenter without boxes to segment in.
        if not isinstance(error, DataError) or (is_segmenter(predictor) and not sample.truth):
            return None
        what = one_line(error)
        return error if path in what else DataError(f"{path}: {what}", error.kind)
    if os.environ.get("PLANES_TRACEBACK") or "CUDA error" in str(error):
        return None
    what = f"{path}: {type(error).__name__}: {one_line(error, 200)}"
    return DataError(what, "too large" if out_of_memory(error) else "prediction")


class ImageResult(NamedTuple):
    """One image and one predictor: the predictions, or why there are none.

    Attributes:
        label: of the predictor.
        sample: the image's entry in the data set.
        image: RGB uint8 (H, W, 3) as it was predicted; None where it failed.
        outcome: predictions, or the error.
        seconds: that the prediction took; NaN where it failed.
    """

    label: str
    sample: Sample
    image: np.ndarray | None
    outcome: Instances | DataError
    seconds: float


def predict_images(
    predictors: Mapping[str, Predictor],
    samples: Iterable[Sample],
    *,
    renderings: Mapping[str, Rendering] | None = None,
    known: Container[tuple[str, str]] = (),
) -> Iterator[ImageResult]:
    """Predict each image with every predictor before the next image; an image that fails, fails for one predictor alone.

    Args:
        predictors: by label.
        samples: the images.
        renderings: how each predictor reads image files, by label; the sample's own without it.
        known: (label, image id) of results that are not needed.

    Raises:
        Exception: a predictor cannot work at all.
    """
    labels = list(predictors)
    for number, sample in enumerate(samples):
        images: dict[Rendering, np.ndarray] = {}
        # The first predictor meets colder caches: they take turns.
        for label in labels if number % 2 else labels[::-1]:
            if (label, sample.image_id) in known:
                continue
            rendering = (renderings or {}).get(label, sample.rendering)
            try:
                if rendering not in images:
                    images[rendering] = replace(sample, rendering=rendering).read()
                started = time.perf_counter()
                instances = predict_image(predictors[label], images[rendering], sample)
                seconds = time.perf_counter() - started
            except Exception as error:
                failure = image_failure(error, predictors[label], sample)
                if failure is None:
                    raise
                yield ImageResult(label, sample, None, failure, math.nan)
                continue
            yield ImageResult(label, sample, images[rendering], instances, seconds)


@dataclass(frozen=True)
class Predictions:
    """The predictions for a data set's images, in its order; ``failed``: image id -> why it has none."""

    instances: list[Instances] = field(default_factory=list)
    failed: dict[str, DataError] = field(default_factory=dict)


def predict_dataset(
    predictor: Predictor, dataset: Dataset, on_image: Callable[[np.ndarray, Sample, Instances], None] | None = None
) -> Predictions:
    """Predict the images of a data set one after the other; those that cannot be read or predicted are failures.

    Args:
        predictor: a detector or a segmenter.
        dataset: its images.
        on_image: is called with each image and its predictions.

    Raises:
        DataError: no image could be predicted.
        Exception: the model cannot work at all.
    """
    predictions = Predictions()
    for result in predict_images({"": predictor}, dataset.samples):
        if isinstance(result.outcome, DataError):
            predictions.failed[result.sample.image_id] = result.outcome
            continue
        predictions.instances.append(result.outcome)
        if on_image is not None and result.image is not None:
            on_image(result.image, result.sample, result.outcome)
    if dataset.samples and not predictions.instances:
        raise DataError(
            f"{dataset.name}/{dataset.split}: none of its {len(dataset)} images could be predicted; "
            f"the first: {next(iter(predictions.failed.values()))}"
        )
    return predictions


def evaluate_predictions(
    predictions: list[Instances],
    dataset: Dataset,
    segmenter: bool,
    *,
    score_threshold: float = 0.05,
    failed: Collection[str] | None = None,
) -> list[tuple[str, Evaluation]]:
    """All numbers that the predictions allow, as (metric prefix, Evaluation).

    Boxes have no prefix, masks of detected planes ``mask_``; a crop segmenter is
    measured by the IoU in its boxes.

    Args:
        failed: ids of images that could not be read or predicted, None where that is not known. They count as
            images without detections; how many they are stands in the settings, and as the metric ``images_failed``.
    """
    results = _evaluations(predictions, dataset, segmenter, score_threshold)
    if failed is None:
        return results
    count = len(set(failed) & {s.image_id for s in dataset.samples})
    results = [(p, replace(e, settings={**e.settings, "images_failed": count})) for p, e in results]
    prefix, first = results[0]
    return [(prefix, replace(first, metrics={**first.metrics, "images_failed": float(count)})), *results[1:]]


def _evaluations(
    predictions: list[Instances], dataset: Dataset, segmenter: bool, score_threshold: float
) -> list[tuple[str, Evaluation]]:
    if segmenter:
        by_id = {p.image_id: list(p.masks or ()) for p in predictions}
        return [("", evaluate_masks(dataset, [by_id.get(s.image_id, []) for s in dataset.samples]))]
    results = [("", evaluate_instances(dataset, predictions, score_threshold=score_threshold))]
    if dataset.has_masks and predictions and all(p.masks is not None for p in predictions):
        results.append(("mask_", evaluate_instances(dataset, predictions, "segm", score_threshold=score_threshold)))
    return results
