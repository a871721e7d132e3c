"""One scoring job: a predictor over a data set into a folder; knows no MLflow and no command line."""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from models.errors import DataError, OutputError, one_line
from models.images.rendering import Rendering
from models.instances import Instances
from models.predictor import Predictor
from models.tiling.predictor import tiling_of
from models.tiling.settings import Tiling
from pipelines.data.dataset import Dataset
from pipelines.evaluation.inference import evaluate_predictions, is_segmenter
from pipelines.evaluation.metrics import Evaluation
from pipelines.files import write_text
from pipelines.progress import Progress
from scoring.jobs.completing import complete
from scoring.jobs.export import FORMATS, KAGGLE_THRESHOLD, export
from scoring.jobs.manifest import LOGGED, Generation, Manifest, claimed, make_manifest, read_manifest
from scoring.jobs.shards import ERRORS, INSTANCES
from scoring.requests import DEFAULT_THRESHOLD, JobSettings
from scoring.runners.local import LocalRunner, auto_batch, auto_workers
from scoring.runners.runner import Runner
from scoring.writers import parquet


@dataclass
class JobResult:
    """Result of a job.

    Attributes:
        label: of the version.
        folder: where the outputs are.
        images: how many were predicted.
        instances: planes detected in them.
        failures: images that could not be read or predicted.
        seconds: of work, of earlier interrupted calls too.
        evaluations: prefix of the metrics and evaluation, where there is ground truth.
        segmenter: whether the version segments given boxes.
        score_threshold: least score that was kept.
        megabytes: size of the saved model.
        resumed: how many of the images had been scored by an earlier, interrupted call.
        timings: seconds by operation, of all threads together.
        peaks: highest memory in MB by kind.
        run_id: of the MLflow run that this call logged.
        unlogged: why the tracking store did not take it.
        little: how many images fill little of the range that they are read with.
        first_little: id of the first of them.
        outputs: what they were made of: digest of the images in their order, and how they were written.
        generation: what the last update found, None for a job that never had one.
        unchanged: whether nothing was new, all outputs being written and logged already.
    """

    label: str
    folder: Path
    _: KW_ONLY
    images: int
    instances: int
    failures: int
    seconds: float
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    segmenter: bool = False
    score_threshold: float = 0.05
    megabytes: float = math.nan
    resumed: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None
    unlogged: str | None = None
    little: int = 0
    first_little: str = ""
    outputs: str = ""
    generation: Generation | None = None
    unchanged: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What a script asks for, as plain values."""
        return {
            "version": self.label,
            "folder": self.folder,
            "run_id": self.run_id,
            "unlogged": self.unlogged,
            "images": self.images,
            "planes": self.instances,
            "failed": self.failures,
            "errors": self.folder / ERRORS if self.failures else None,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "unchanged": self.unchanged,
        }

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
        ) from error


def folder_name(label: str) -> str:
    """A label such as ``planes-det/3`` as a folder name.

    >>> folder_name("planes-det/3")
    'planes-det-3'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", label)


def run_job(
    predictor: Predictor,
    label: str,
    dataset: Dataset,
    out: Path,
    *,
    settings: JobSettings,
    progress: Progress,
    model: str = "",
    device: str = "cpu",
    runner: Runner | None = None,
) -> JobResult:
    """Predict every image, write table, COCO results, overlays and metrics into ``out/<label>``.

    The work is done in shards that are on disk whole or not at all: called again after a
    stop, the missing ones are made, and the tables are those of an undisturbed call.
    Unreadable images are listed in ``errors.parquet`` and the others scored. With ``settings.update``
    a job of other inputs is brought up to date (`scoring.jobs.update`).

    Args:
        model: digest of the saved model, device: where it runs; both decide the rows.
        runner: what predicts, ``predictor`` in this process without it; decides no row.

    Raises:
        DataError: no image could be read, or the folder holds another job.
        OutputError: the folder cannot be written, or somebody else is writing there.
    """
    folder = out / folder_name(label)
    claim_folder(folder)
    batch_size = settings.batch_size or auto_batch(device)
    decisive = decisive_settings(predictor, dataset.rendering, settings, device)
    workers = settings.workers or auto_workers(device, dataset)
    runner = runner or LocalRunner(predictor, device, batch_size=batch_size, workers=workers, kind=settings.precision)
    manifest = make_manifest(label, model, settings=decisive, dataset=dataset, shard_size=settings.shard_size)
    try:
        with claimed(folder, manifest, dataset, fresh=settings.fresh, update=settings.update) as held:
            if held is not None and is_segmenter(predictor):
                raise DataError(f"{label}: outlines given boxes, which may be others now; score with --fresh")
            resumed, totals = complete(runner, manifest, folder, dataset, settings=settings, progress=progress, held=held)
            if not totals.images:
                first = parquet.read_failures(folder / ERRORS)[0]
                raise DataError(
                    f"none of {len(dataset)} images could be scored; the first: {first.message} (--fresh tries again)"
                )
            job = JobResult(
                label,
                folder,
                images=totals.images,
                instances=totals.instances,
                failures=totals.failures,
                seconds=totals.seconds,
            )
            job.segmenter, job.score_threshold, job.resumed = is_segmenter(predictor), settings.score_threshold, resumed
            job.timings, job.peaks = totals.timings, runner.peak_megabytes()
            job.little, job.first_little = totals.little, totals.first_little
            manifest = read_manifest(folder)
            job.generation = next(iter(manifest.generations[::-1]), None)
            job.outputs = f"{manifest.inputs} {settings.rle} {settings.geojson} {settings.overlays}"
            job.unchanged = settings.update and resumed == len(dataset) and _is_logged(folder, job.outputs)
            if not job.unchanged or dataset.has_truth:
                _write(job, dataset, totals.masks, settings, manifest)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or one_line(error)}); what is done is kept, call again"
        ) from error
    return job


def _is_logged(folder: Path, outputs: str) -> bool:
    written = (folder / "coco_results.json").exists() and (folder / LOGGED).exists()
    return written and (folder / LOGGED).read_text() == outputs


def decisive_settings(predictor: Predictor, rendering: Rendering, settings: JobSettings, device: str) -> dict[str, Any]:
    """The settings that decide a job's rows, as manifests keep them."""
    tiling = tiling_of(predictor)
    decisive = {
        "score_threshold": settings.score_threshold,
        "batch_size": settings.batch_size or auto_batch(device),
        "tiling": _tiling_settings(tiling) if tiling else None,
        "device": device.partition(":")[0],
        "precision": settings.precision,
        "runtime": settings.runtime,
        "rendering": rendering.model_dump(mode="json"),
    }
    # A threshold that somebody gave holds for the Kaggle CSV too.
    suggested = settings.scores is not None and settings.score_threshold == DEFAULT_THRESHOLD
    return decisive | ({KAGGLE_THRESHOLD: settings.scores.threshold} if suggested else {})


def _tiling_settings(tiling: Tiling) -> dict[str, Any]:
    """As manifests have them; without scales and turns where there is but one, so that older jobs can be gone on with."""
    one = {"zooms", "zoom_weights"} if tiling.zooms == (1.0,) else set()
    return tiling.model_dump(mode="json", exclude=one | ({"turns"} if tiling.turns == 1 else set()))


def _write(job: JobResult, dataset: Dataset, has_masks: bool, settings: JobSettings, manifest: Manifest) -> None:
    table = parquet.InstanceTable(job.folder / INSTANCES)
    made = set(FORMATS) if has_masks or not job.instances else set(FORMATS) - {"kaggle"}
    made -= set() if settings.overlays else {"overlays"}
    least = manifest.settings.get(KAGGLE_THRESHOLD, 0.0)
    export(
        table,
        dataset,
        job.folder,
        made,
        rle=settings.rle,
        form=settings.geojson,
        most=settings.overlays,
        kaggle_threshold=least,
    )
    if not dataset.has_truth:
        return
    failed = {f.image_id for f in parquet.read_failures(job.folder / ERRORS)} if job.failures else set()
    if job.segmenter and not dataset.has_masks:
        # Outlines in boxes can be made where none are known, but not measured; the kind of the table is noted all the same.
        content = [{"prefix": "", "metrics": {}, "settings": {"kind": "crop masks"}}]
        write_text(job.folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    elif dataset.planes:
        predictions = list(table)
        listed = {p.image_id for p in predictions}
        # Images without a plane have no row; they count as ones with masks where masks were made. Images that failed
        # have no row either, and all their planes are missed.
        empty = [
            Instances.empty(s.image_id, s.height, s.width, masks=has_masks)
            for s in dataset.samples
            if s.image_id not in listed
        ]
        job.evaluations = evaluate_predictions(
            [*predictions, *empty], dataset, job.segmenter, score_threshold=settings.score_threshold, failed=failed
        )
        content = [{"prefix": p, "metrics": e.finite(), "settings": e.settings} for p, e in job.evaluations]
        write_text(job.folder / "metrics.json", json.dumps(content, indent=2) + "\n")
