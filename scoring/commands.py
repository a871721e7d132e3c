"""What the commands `score` and `score compare` do, with progress shown: one version scored, several compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from models.errors import DataError
from models.predictor import load_model
from models.tiling import tiling_of
from models.torch_tools import pick_device
from pipelines import registry, tracking
from pipelines.data.dataset import Dataset
from pipelines.data.opening import open_dataset
from pipelines.evaluation import coco_tables
from pipelines.steps.edge import show_progress
from scoring import track
from scoring.candidates import data_of, from_job, gather, is_run
from scoring.compare import Candidate, Scored, compare, comparison_table, render
from scoring.job import JobResult, JobSettings, claim_folder, run_job
from scoring.plan import folder_digest
from scoring.report import write_report

# What the terminal shows of the table; the CSV and the page hold all.
SHOWN = ("model", "AP", "AP50", "mask_AP", "mask_AP50", "matched_IoU", "correct", "missed", "false", "images/s", "MB")


@dataclass(frozen=True)
class ComparisonRequest:
    """What the command was asked for."""

    targets: tuple[str, ...]
    data: str | None
    split: str
    out: str
    device: str
    score_threshold: float


def run_comparison(request: ComparisonRequest) -> None:
    """Gather, compare, write and log; crop segmenters, which find nothing, end in a table of their runs.

    Raises:
        PlanesError: targets that cannot be used, or that are over different images.
    """
    claim_folder(Path(request.out))
    uri = tracking.connect()
    runs = {t: track.load_scored(t) for t in request.targets if is_run(t)}
    if request.data is None and not runs:
        raise DataError("give --data: only scoring runs know what they were made on")
    if runs and len(runs) == len(request.targets):
        click.echo(render(comparison_table(list(runs.values()))) if _same(list(runs.values())) else "")
        if any("IoU" in r.metrics for r in runs.values()):
            return
    dataset = open_dataset(request.data, request.split) if request.data else data_of(list(runs.values()))
    if not dataset.has_truth or not dataset.planes:
        raise DataError(f"{dataset.name}/{dataset.split}: no annotated planes to compare against")
    click.echo(dataset.summary())
    device = pick_device(request.device)
    settings = JobSettings(score_threshold=request.score_threshold)

    def score(target: str) -> Candidate:
        version = registry.resolve(target)
        _, job = score_version(version, dataset, Path(request.out), settings, device)
        if job.segmenter:
            raise DataError(f"{job.label}: outlines given boxes and finds none; score it and compare its runs")
        return from_job(job)

    finish(gather(request.targets, dataset, runs, score), dataset, Path(request.out))
    click.echo(f"MLflow UI: {tracking.ui_command(uri)}")


def _same(runs: Sequence[Scored]) -> bool:
    return len({r.digest for r in runs}) == 1


def compare_jobs(jobs: Sequence[JobResult], dataset: Dataset, out: Path) -> None:
    """Compare what has just been scored; crop segmenters are left out."""
    candidates = [from_job(job) for job in jobs if not job.segmenter]
    if len(candidates) > 1:
        finish(candidates, dataset, out)


def finish(candidates: Sequence[Candidate], dataset: Dataset, out: Path) -> None:
    """Compare candidates; write report.html and comparison.csv; log them."""
    comparison = compare(dataset, candidates)
    table = comparison.table(candidates)
    table.to_csv(out / "comparison.csv", index=False)
    report = write_report(comparison, candidates, dataset, out / "report.html")
    click.echo(render(table[[name for name in SHOWN if name in table]]))
    for pair in comparison.pairs:
        interval = f" (95 % interval {pair.interval[0]:+.3f} to {pair.interval[1]:+.3f})" if pair.interval else ""
        what = "masks" if pair.kind == "segm" else "boxes"
        against = f"{pair.label} against {comparison.labels[0]}"
        click.echo(f"{against}, {what}: AP {pair.difference:+.3f}{interval}: {pair.verdict}")
    run_id = track.log_comparison(out, comparison, dataset)
    click.echo(f"report: {report} (run {run_id})")


def score_version(
    version: registry.Resolved, dataset: Dataset, out: Path, settings: JobSettings, device: str
) -> tuple[Scored, JobResult]:
    """Run one job, log it, and say what it left."""
    folder = registry.fetch(version)
    predictor = load_model(folder, device, settings.changes)
    digest = folder_digest(folder)
    job = run_job(predictor, version.label, dataset, out, settings, show_progress, digest, device)
    job.megabytes = folder_megabytes(folder)
    tiling = tiling_of(predictor)
    params = {**settings.__dict__, "batch_size": settings.batch_size or 1}
    params |= {"tiling": tiling.model_dump_json() if tiling else "whole images"}
    params |= {"device": device, "data": str(dataset.source)}
    run_id = track.log_job(job, version, dataset, params, job.megabytes)
    errors = f", {job.failures} unreadable (see errors.parquet)" if job.failures else ""
    errors += f", {job.resumed} of them scored before" if job.resumed else ""
    click.echo(f"{job.label}: {job.instances} planes in {job.images} images{errors}, {job.seconds:.1f} s, run {run_id}")
    click.echo(f"   outputs in {job.folder}")
    for _, evaluation in job.evaluations:
        if "max_dets" in evaluation.settings:
            click.echo(coco_tables(evaluation))
    name = f"{dataset.name}/{dataset.split}"
    return Scored(job.label, name, dataset.digest(), job.metrics, job.images, job.seconds), job


def folder_megabytes(folder: Path) -> float:
    """Size of a saved model in MB (10^6 bytes)."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
