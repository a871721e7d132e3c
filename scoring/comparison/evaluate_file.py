"""A file of predictions against ground truth: an instance table or a Kaggle submission."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from models.errors import DataError
from models.instances import Instances
from pipelines.data.dataset import Dataset
from pipelines.evaluation.inference import evaluate_predictions
from pipelines.evaluation.metrics import Evaluation, evaluate_instances
from scoring.jobs.manifest import MANIFEST, read_manifest
from scoring.jobs.shards import ERRORS
from scoring.requests import Convention
from scoring.writers.kaggle import read_submission
from scoring.writers.parquet import read_failures, read_instances

log = logging.getLogger(__name__)


def read_predictions(path: Path, dataset: Dataset, convention: Convention = "course") -> list[Instances]:
    """Predictions of a .parquet table or a .csv submission over the images of a data set.

    Raises:
        DataError: neither, damaged, or over other images.
    """
    if _outlines_given_boxes(path.parent):
        raise DataError(f"{path}: is of a version that outlines given boxes and finds none; its IoU is in metrics.json")
    if path.suffix.lower() == ".csv":
        return read_submission(path, dataset, convention)
    if path.suffix.lower() == ".parquet":
        return checked_sizes(read_instances(path), dataset, str(path))
    raise DataError(f"{path}: expected an instances.parquet or a Kaggle .csv")


def _outlines_given_boxes(job: Path) -> bool:
    """Whether a job's folder is that of a crop segmenter: its boxes are those of the truth."""
    try:
        content = json.loads((job / "metrics.json").read_text()) if (job / MANIFEST).is_file() else []
    except (OSError, ValueError):
        return False
    return any(entry.get("settings", {}).get("kind") == "crop masks" for entry in content if isinstance(entry, dict))


def checked_sizes(predictions: list[Instances], dataset: Dataset, name: str) -> list[Instances]:
    """The predictions, if they were made on images of the data set's sizes.

    Raises:
        DataError: one was not; ``name`` is where the predictions come from.
    """
    samples = {s.image_id: s for s in dataset.samples}
    for one in predictions:
        sample = samples.get(one.image_id)
        if sample is not None and sample.height and not sample.lost and (one.height, one.width) != sample.size():
            sizes = f"{one.width}x{one.height}, in {dataset.name}/{dataset.split} it is {sample.width}x{sample.height}"
            raise DataError(f"{name}: image {one.image_id!r} is {sizes}; score the data set's own images")
    return predictions


def category_of_file(path: Path) -> str | None:
    """The class of the job that left a file of predictions, by the manifest beside it; None where there is none."""
    if not (path.parent / MANIFEST).is_file():
        return None
    return read_manifest(path.parent).category


def evaluate_file(path: Path, dataset: Dataset, *, score_threshold: float, convention: Convention) -> list[Evaluation]:
    """Evaluations of boxes and masks; of a submission, which has no boxes of its own, of its masks.

    Raises:
        DataError: predictions or truth that cannot be used.
    """
    predictions = read_predictions(path, dataset, convention)
    dataset = _with_truth(dataset)
    known = {sample.image_id for sample in dataset.samples}
    predictions = [one for one in predictions if one.image_id in known]
    count = len(failed_images(path, dataset, predictions) or ())
    if path.suffix.lower() == ".csv":
        evaluations = [evaluate_instances(dataset, predictions, "segm", score_threshold=score_threshold)]
    else:
        evaluations = [e for _, e in evaluate_predictions(predictions, dataset, False, score_threshold=score_threshold)]
    if not predictions and dataset.has_masks and len(evaluations) == 1 and path.suffix.lower() == ".parquet":
        # An empty table does not show whether masks were made.
        evaluations.append(evaluate_instances(dataset, predictions, "segm", score_threshold=score_threshold))
    return [replace(e, settings={**e.settings, "images_failed": count}) for e in evaluations]


def _with_truth(dataset: Dataset) -> Dataset:
    """Of images some of which have annotations, as the course's training and test images together, those."""
    known = tuple(sample for sample in dataset.samples if sample.truth)
    if len(known) in (0, len(dataset)):
        return dataset
    log.info(f"{len(dataset) - len(known)} of {len(dataset)} images have no annotations: measured over the others")
    return replace(dataset, samples=known)


def failed_images(path: Path, dataset: Dataset, predictions: Sequence[Instances]) -> set[str] | None:
    """Ids of the images that failed for a file of predictions: those in the table of errors beside it, and lost ones.

    None where neither is known. They count as images without detections, as all do that have no row.
    """
    listed = {f.image_id for f in predictions}
    lost = {s.image_id for s in dataset.samples if s.lost and s.image_id not in listed}
    if not (path.parent / MANIFEST).is_file() or not (path.parent / ERRORS).is_file():
        return lost or None
    return lost | ({f.image_id for f in read_failures(path.parent / ERRORS)} & {s.image_id for s in dataset.samples})
