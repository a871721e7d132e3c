"""Scoring runs in MLflow: linked to the version and the data set, and read back for comparison."""

from __future__ import annotations

import hashlib
import logging
import math
from contextlib import suppress
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

from models.errors import DataError, RegistryError, one_line
from models.images.decoding import read_image
from models.images.windows import shrunk
from pipelines.data.dataset import Dataset
from pipelines.evaluation.categories import PLANE
from pipelines.files import write_text
from pipelines.registry.model_versions import Resolved
from pipelines.tracking import mlflow_runs
from pipelines.tracking.pictures import PictureLog
from scoring.comparison.compare import Comparison, Scored
from scoring.comparison.logged_table import LEFT
from scoring.jobs.job import JobResult, folder_name
from scoring.jobs.manifest import LOGGED, PLAN, UNLOGGED, Generation
from scoring.jobs.shards import INSTANCES
from scoring.parts.job import PartsResult
from scoring.parts.plan import SUMMARY

# Files and folders of a job above one of these stay where they are.
MOST_BYTES, MOST_FILES = 100_000_000, 1000
# Overlays that are logged by key too, and their longer side in pixels.
MOST_PICTURES, PICTURE_SIDE = 3, 768

log = logging.getLogger(__name__)


def log_job(
    client: MlflowClient,
    job: JobResult,
    resolved: Resolved,
    dataset: Dataset,
    *,
    params: dict[str, object],
    megabytes: float = math.nan,
) -> str:
    """Log one scoring as an MLflow run with its outputs; return the run's id.

    ``megabytes`` is the size of the model's saved folder.
    """
    # A number on training images must never look like one on test images.
    prefix = next((f"{name}/" for name in ("train", "val") if dataset.split.startswith(name)), "test/")
    tags = {"task": "score", "version": job.label, "metric_prefix": prefix}
    tags |= {"outlines_given_boxes": "true"} if job.segmenter else {}
    tags |= {"generation": str(job.generation.number)} if job.generation else {}
    # Written while a run is being logged: after a stop, or a store that went away, it is gone on with.
    pending = job.folder / UNLOGGED
    resumed = pending.read_text() if pending.exists() else None
    with mlflow_runs.tracked_run(
        client, f"score {job.label} on {dataset.name}/{dataset.split}", tags, resume_id=resumed
    ) as run:
        pending.write_text(run.info.run_id)
        mlflow_runs.log_params(
            {**params, "model": job.label, "data_digest": dataset.digest(), "category": dataset.category}
        )
        mlflow_runs.log_dataset(dataset, "scoring")
        model_id = mlflow_runs.link_model(resolved.model_id)
        counts: dict[str, float] = {"images": job.images, "instances": job.instances, "errors": job.failures}
        counts |= {"images_filling_little_of_their_range": job.little} if job.little else {}
        if job.generation:
            counts |= _kinds(job.generation)
        if not math.isnan(megabytes):
            mlflow.log_metric("model_megabytes", megabytes)
        mlflow.log_metrics({**counts, "seconds": job.seconds, "images_per_second": job.images / job.seconds})
        mlflow.log_metrics({f"stage_{name}_seconds": seconds for name, seconds in job.timings.items()})
        mlflow.log_metrics({f"peak_{name}_megabytes": megabytes for name, megabytes in job.peaks.items()})
        for kind, evaluation in job.evaluations:
            mlflow_runs.log_evaluation(prefix + kind, evaluation, dataset, model_id=model_id)
        _log_outputs(job.folder)
        _log_overlays(client, run.info.run_id, job.folder / "overlays")
    pending.unlink(missing_ok=True)
    write_text(job.folder / LOGGED, job.outputs)
    return run.info.run_id


def log_parts(client: MlflowClient, result: PartsResult, resolved: Resolved, *, params: dict[str, object]) -> str:
    """Log a job in parts: its plan, its sums and where its tables are, none of the tables; return the run's id."""
    plan, totals = result.plan, result.totals
    tags = {"task": "score", "version": plan.label, "metric_prefix": "test/", "layout": "parts"}
    news = plan.generations[-1].news
    tags |= {"generation": str(news.number)} if news else {}
    with mlflow_runs.tracked_run(client, f"score {plan.label} on {plan.data}/{plan.split}", tags) as run:
        known = {
            "model": plan.label,
            "data_digest": plan.all_inputs,
            "category": plan.category,
            "tables": str(result.place),
        }
        mlflow_runs.log_params({**params, **known, "parts": len(plan.numbers)})
        mlflow_runs.log_listing(f"{plan.data}/{plan.split}", plan.source, plan.all_inputs)
        mlflow_runs.link_model(resolved.model_id)
        mlflow.log_metrics({"images": totals.images, "instances": totals.instances, "errors": totals.failures})
        if news:
            mlflow.log_metrics(_kinds(news))
        if totals.little:
            mlflow.log_metric("images_filling_little_of_their_range", totals.little)
        # Of all parts together, also where actors worked side by side; the rate is that of this call, by the clock.
        mlflow.log_metric("seconds", totals.seconds)
        if result.rate is not None:
            mlflow.log_metric("images_per_second", result.rate)
        mlflow.log_metric("model_megabytes", result.megabytes)
        mlflow.log_metrics({f"stage_{name}_seconds": seconds for name, seconds in totals.timings.items()})
        mlflow.log_metrics({f"peak_{name}_megabytes": megabytes for name, megabytes in result.peaks.items()})
        for name in (PLAN, SUMMARY):
            mlflow.log_text(result.place.read(name).decode(), f"scoring/{name}")
    return run.info.run_id


def _kinds(generation: Generation) -> dict[str, float]:
    counts = generation.model_dump(include={*Generation.KINDS, "gone", "unreadable"})
    return {f"generation_{kind}": number for kind, number in counts.items()}


def _log_outputs(folder: Path) -> None:
    """Log a job's files; of those that are too large for a tracking store where they are, and the table's digest."""
    left: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        size = sum(p.stat().st_size for p in files)
        if size > MOST_BYTES or len(files) > MOST_FILES:
            left[path.name] = {"files": len(files), "bytes": size}
            if path.name == INSTANCES:
                with open(path, "rb") as handle:
                    left[path.name]["sha256"] = hashlib.file_digest(handle, "sha256").hexdigest()
        elif path.is_dir():
            mlflow.log_artifacts(str(path), f"scoring/{path.name}")
        else:
            mlflow.log_artifact(str(path), "scoring")
    if left:
        mlflow.log_dict({"folder": str(folder.resolve()), "left": left}, f"scoring/{LEFT}")
        log.info(f"   too large for the tracking store, left where they are: {', '.join(left)}")


def _log_overlays(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Log the first overlays, which show the same images for every version of the same data, by key for MLflow's grid."""
    pictures = {}
    for number, file in enumerate(sorted(folder.glob("*.jpg"))[:MOST_PICTURES], start=1):
        # One that somebody damaged meanwhile is missing among them.
        with suppress(DataError):
            pictures[f"overlay_{number}"] = shrunk(read_image(file), PICTURE_SIDE)
    PictureLog(client, run_id).log(pictures)


def load_scored(client: MlflowClient, run_id: str) -> Scored:
    """Read a past scoring run back.

    Raises:
        RegistryError: no such run, or not a scoring run.
    """
    try:
        run = client.get_run(run_id)
    except mlflow.MlflowException as error:
        raise RegistryError(f"run {run_id!r}: not found ({one_line(error, 120)}); {recent_runs(client)}") from error
    if run.data.tags.get("task") != "score":
        raise RegistryError(f"run {run_id!r}: not a scoring run; {recent_runs(client)}")
    prefix = run.data.tags.get("metric_prefix", "test/")
    metrics = {k.removeprefix(prefix): v for k, v in run.data.metrics.items() if k.startswith(prefix)}
    failed = int(run.data.metrics.get("errors", 0))
    data = next((i.dataset for i in (run.inputs.dataset_inputs if run.inputs else ())), None)
    return Scored(
        run.data.tags.get("version", run_id),
        data.name if data else "unknown data",
        run.data.params.get("data_digest", "unknown"),
        metrics,
        int(run.data.metrics.get("images", 0)),
        run.data.metrics.get("seconds", 0.0),
        run.data.params.get("data.used", run.data.params.get("data", "")),
        float(run.data.params.get("score_threshold", 0.05)),
        run.data.metrics.get("model_megabytes", math.nan),
        # Releases before 0.6.1 measured every version against planes.
        run.data.params.get("category", PLANE),
        failed,
        # They left failed images out of their metrics, too.
        leaves_out=bool(failed and metrics and "images_failed" not in metrics),
        segmenter="IoU" in metrics or run.data.tags.get("outlines_given_boxes") == "true",
    )


def recent_runs(client: MlflowClient, most: int = 5) -> str:
    """The newest scoring runs, for error messages."""
    experiments = [e.experiment_id for e in client.search_experiments(max_results=100)]
    runs = client.search_runs(experiments, "tags.task = 'score'", max_results=most)
    listed = ", ".join(f"{r.info.run_id} ({r.data.tags.get('version', '?')})" for r in runs)
    return f"newest scoring runs: {listed}" if listed else "there are no scoring runs yet"


def log_comparison(client: MlflowClient, folder: Path, comparison: Comparison, dataset: Dataset) -> str:
    """Log a comparison with its report, table and differences as a run of its own; return the run's id."""
    labels = comparison.labels
    with mlflow_runs.tracked_run(client, f"compare {', '.join(labels)}", {"task": "compare"}) as run:
        mlflow_runs.log_params({"models": ", ".join(labels), **comparison.settings})
        mlflow_runs.log_dataset(dataset, "comparison")
        for pair in comparison.pairs:
            name = f"{folder_name(pair.label)}/{'mask_' if pair.kind == 'segm' else ''}AP_difference"
            mlflow.log_metric(name, pair.difference)
            if pair.interval is not None:
                mlflow.log_metrics({f"{name}_low": pair.interval[0], f"{name}_high": pair.interval[1]})
        for name in ("report.html", "comparison.csv"):
            if (folder / name).exists():
                mlflow.log_artifact(str(folder / name))
        return run.info.run_id
