"""A file of predictions against ground truth: an instance table or a Kaggle submission."""

from __future__ import annotations

from pathlib import Path

from models.errors import DataError
from models.instances import Instances
from pipelines.data.dataset import Dataset
from pipelines.evaluation import Evaluation, evaluate_instances
from pipelines.prediction import evaluate_predictions
from scoring.plan import MANIFEST, read_manifest
from scoring.writers.kaggle import Convention, read_submission
from scoring.writers.parquet import read_instances


def read_predictions(path: Path, dataset: Dataset, convention: Convention = "course") -> list[Instances]:
    """Predictions of a .parquet table or a .csv submission over the images of a data set.

    Raises:
        DataError: neither, damaged, or over other images.
    """
    if path.suffix.lower() == ".csv":
        return read_submission(path, dataset, convention)
    if path.suffix.lower() == ".parquet":
        return read_instances(path)
    raise DataError(f"{path}: expected an instances.parquet or a Kaggle .csv")


def category_of_file(path: Path) -> str | None:
    """The class of the job that left a file of predictions, by the manifest beside it; None where there is none."""
    if not (path.parent / MANIFEST).is_file():
        return None
    return read_manifest(path.parent).category


def evaluate_file(path: Path, dataset: Dataset, score_threshold: float, convention: Convention) -> list[Evaluation]:
    """Evaluations of boxes and masks; of a submission, which has no boxes of its own, of its masks.

    Raises:
        DataError: predictions or truth that cannot be used.
    """
    found = read_predictions(path, dataset, convention)
    if path.suffix.lower() == ".csv":
        return [evaluate_instances(dataset, found, "segm", score_threshold)]
    evaluations = [e for _, e in evaluate_predictions(found, dataset, False, score_threshold)]
    if not found and dataset.has_masks:
        # An empty table does not tell whether masks were looked for.
        evaluations.append(evaluate_instances(dataset, found, "segm", score_threshold))
    return evaluations
