"""One scoring job: a predictor over a data set into a folder; knows no MLflow and no command line."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import DataError, OutputError, one_line
from models.instances import Instances
from models.predictor import Predictor
from pipelines.data.dataset import Dataset
from pipelines.evaluation import Evaluation
from pipelines.prediction import evaluate_predictions, is_segmenter
from scoring.reader import Failure
from scoring.runners.local import predict_all
from scoring.writers import coco, geojson, kaggle, overlays, parquet

Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]


@dataclass(frozen=True)
class JobSettings:
    """How to score.

    batch_size: images at a time, and tiles per forward pass where it is given; score_threshold:
    least score kept; overlays: how many; rle: convention of the Kaggle CSV; tiling: settings of
    `models.tiling.Tiling` instead of the version's, ``{"size": 0}`` for whole images.
    """

    batch_size: int | None = None
    score_threshold: float = 0.05
    overlays: int = 3
    rle: kaggle.Convention = "course"
    tiling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, Any]:
        """What to change of the version's tiling."""
        return {**self.tiling, **({"batch": self.batch_size} if self.batch_size and self.tiling.get("size") != 0 else {})}


@dataclass
class JobResult:
    """What a job left: its folder, counts, times, and metrics where there is ground truth."""

    label: str
    folder: Path
    images: int
    instances: int
    failures: list[Failure]
    seconds: float
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    segmenter: bool = False
    score_threshold: float = 0.05
    megabytes: float = math.nan

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of all evaluations, prefixed; only those that exist."""
        return {k: v for prefix, e in self.evaluations for k, v in e.finite(prefix).items()}


def claim_folder(folder: Path) -> None:
    """Make the output folder and prove that files can be written there.

    Raises:
        OutputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or one_line(error)}); name another --out"
        ) from None


def folder_name(label: str) -> str:
    """A label such as ``planes-det/3`` as a folder name.

    >>> folder_name("planes-det/3")
    'planes-det-3'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", label)


def run_job(
    predictor: Predictor, label: str, dataset: Dataset, out: Path, settings: JobSettings, progress: Progress
) -> JobResult:
    """Predict every image, write table, COCO results, overlays and metrics into ``out/<label>``.

    Unreadable images are listed in ``errors.parquet`` and the others scored.

    Raises:
        DataError: no image could be read.
        OutputError: the folder cannot be written.
    """
    folder = out / folder_name(label)
    claim_folder(folder)
    started = time.monotonic()
    found: list[Instances] = []
    failures: list[Failure] = []
    results = predict_all(predictor, dataset, settings.batch_size or 1)
    for result in progress(results, len(dataset), f"scoring with {label}"):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            found.append(result.above(settings.score_threshold))
    seconds = time.monotonic() - started
    if not found:
        raise DataError(f"none of {len(dataset)} images could be read; the first: {failures[0].message}")
    job = JobResult(label, folder, len(found), sum(map(len, found)), failures, seconds)
    job.segmenter, job.score_threshold = is_segmenter(predictor), settings.score_threshold
    try:
        _write(job, dataset, found, settings, job.segmenter)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or one_line(error)})") from None
    return job


def _write(job: JobResult, dataset: Dataset, found: list[Instances], settings: JobSettings, segmenter: bool) -> None:
    table = job.folder / "instances.parquet"
    parquet.write_instances(found, table)
    parquet.write_failures(job.failures, job.folder / "errors.parquet")
    read_back = parquet.read_instances(table)
    coco.write_results(read_back, dataset, job.folder / "coco_results.json")
    if any(f.masks is not None for f in found) or not job.instances:
        kaggle.write_submission(read_back, dataset, job.folder / "kaggle.csv", settings.rle)
    geojson.write_geojson(read_back, dataset, job.folder / "geojson")
    if settings.overlays:
        overlays.write_overlays(read_back, dataset, job.folder / "overlays", settings.overlays)
    scored = {f.image_id for f in found}
    truth = dataset.subset([s.image_id for s in dataset.samples if s.image_id in scored], dataset.split)
    if truth.has_truth and truth.planes:
        job.evaluations = evaluate_predictions(found, truth, segmenter, settings.score_threshold)
        content = [{"prefix": p, "metrics": e.finite(), "settings": e.settings} for p, e in job.evaluations]
        write_text(job.folder / "metrics.json", json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
