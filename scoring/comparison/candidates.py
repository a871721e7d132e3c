"""The targets of a comparison (scoring runs, versions, files of predictions) to candidates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlflow.tracking import MlflowClient

from models.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.data.readers.opening import open_dataset
from scoring.comparison.compare import Candidate, Scored, check_same_data
from scoring.comparison.evaluate_file import checked_sizes, failed_images, read_predictions
from scoring.comparison.logged_table import fetch_table
from scoring.jobs.job import JobResult
from scoring.jobs.manifest import MANIFEST
from scoring.writers.parquet import read_instances

RUN_ID = re.compile(r"^[0-9a-f]{32}$")


def is_run(target: str) -> bool:
    """Whether a target has the form of an MLflow run id."""
    return bool(RUN_ID.match(target))


def data_of(runs: Sequence[Scored]) -> Dataset:
    """The data set that scoring runs were made on, opened where they read it.

    Raises:
        DataError: the runs are over different images, or the data set has moved or changed.
    """
    try:
        check_same_data(runs)
    except DataError as error:
        raise DataError(f"{error}{_difference(runs)}") from error
    first = runs[0]
    dataset = open_dataset(first.source, first.data.rpartition("/")[2], category=first.category, keep=True)
    if dataset.digest() != first.digest:
        raise DataError(f"{first.source}: changed since {first.label} was scored (digest {first.digest}); give --data")
    return dataset


def _difference(runs: Sequence[Scored]) -> str:
    """Which images differ, where both data sets are still to be had."""
    other = next(r for r in runs[1:] if r.digest != runs[0].digest)
    try:
        sets = [open_dataset(r.source, r.data.rpartition("/")[2], category=r.category, keep=True) for r in (runs[0], other)]
    except DataError:
        return ""
    first, second = ({s.image_id for s in d.samples} for d in sets)
    only = [(one.label, sorted(mine - others)) for one, mine, others in ((runs[0], first, second), (other, second, first))]
    differences = [f"{len(names)} images only for {label} (first: {names[0]})" for label, names in only if names]
    return f": {', '.join(differences)}" if differences else ": the same names, but other pixels or annotations"


def from_run(client: MlflowClient, run_id: str, scored: Scored, dataset: Dataset) -> Candidate:
    """A scoring run's instance table.

    Raises:
        RegistryError: its outputs are gone.
        DataError: its images were of other sizes than the data set's.
    """
    if scored.segmenter:
        raise DataError(f"run {run_id}: outlines given boxes and finds none; only runs of such versions can be compared")
    speed = scored.images / scored.seconds if scored.seconds else math.nan
    predictions = checked_sizes(read_instances(fetch_table(client, run_id)), dataset, f"run {run_id}")
    return Candidate(
        scored.label,
        predictions,
        score_threshold=scored.score_threshold,
        images_per_second=speed,
        megabytes=scored.megabytes,
        failed=scored.failed,
    )


def from_job(job: JobResult) -> Candidate:
    """The table that a job has just written."""
    predictions = read_instances(job.folder / "instances.parquet")
    return Candidate(
        job.label,
        predictions,
        score_threshold=job.score_threshold,
        images_per_second=job.images / job.seconds,
        megabytes=job.megabytes,
        failed=job.failures,
        folder=job.folder,
    )


def is_file_of_predictions(target: str) -> bool:
    """Whether a target is a file of predictions, or a folder that scoring wrote."""
    return Path(target).suffix in (".parquet", ".csv") or (Path(target) / "instances.parquet").is_file()


def file_of(target: str) -> Path:
    """The file of predictions that a target names."""
    path = Path(target)
    return path / "instances.parquet" if path.is_dir() else path


def from_file(target: str, dataset: Dataset) -> Candidate:
    """A file of predictions (.parquet or Kaggle .csv), or a folder that scoring wrote.

    Raises:
        DataError: neither, damaged, or over other images.
    """
    path = file_of(target)
    predictions = read_predictions(path, dataset)
    failed = failed_images(path, dataset, predictions)
    label = path.parent.name if path.stem == "instances" else path.name
    job = path.parent if path.stem == "instances" and (path.parent / MANIFEST).is_file() else None
    return Candidate(label, predictions, failed=None if failed is None else len(failed), folder=job)


def gather(
    client: MlflowClient,
    targets: Sequence[str],
    dataset: Dataset,
    *,
    runs: dict[str, Scored],
    score: Callable[[str], Candidate],
) -> list[Candidate]:
    """Candidates in the order of the targets, their labels made different; versions are scored by ``score``.

    Raises:
        DataError: a run over other images than the data set's.
    """
    candidates = []
    for target in targets:
        if target in runs:
            if runs[target].digest != dataset.digest():
                data = f"{dataset.name}/{dataset.split} (digest {dataset.digest()})"
                raise DataError(
                    f"run {target}: was made on {runs[target].data} (digest {runs[target].digest}), not on {data}"
                )
            candidates.append(from_run(client, target, runs[target], dataset))
        elif is_file_of_predictions(target):
            candidates.append(from_file(target, dataset))
        else:
            candidates.append(score(target))
    labels = [c.label for c in candidates]
    return [
        replace(c, label=f"{c.label} ({targets[i][:6] if targets[i] in runs else i + 1})")
        if labels.count(c.label) > 1
        else c
        for i, c in enumerate(candidates)
    ]
