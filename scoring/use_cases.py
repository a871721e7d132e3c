"""Versions scored and compared: what the commands `score` and `score compare` call."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from models.errors import DataError, ModelError, RegistryError, one_line
from models.images.rendering import parse_rendering
from models.loading import load_model
from models.runtime.devices import pick_device
from models.saved.folder import folder_digest
from models.saved.spec import read_spec
from models.tiling.predictor import tiling_of
from pipelines.data.dataset import Dataset
from pipelines.data.readers.opening import check_names, open_dataset
from pipelines.data.remote import is_url
from pipelines.evaluation.categories import category_of, common_category
from pipelines.evaluation.metrics import coco_tables
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.display import SILENT, Display, pass_through
from scoring import mlflow_log
from scoring.common import folder_megabytes, ray_settings, scores_of, tell_generation, tell_work
from scoring.comparison.candidates import data_of, file_of, from_job, gather, is_file_of_predictions, is_run
from scoring.comparison.compare import Candidate, Comparison, Pair, Scored, compare, comparison_table, render
from scoring.comparison.evaluate_file import category_of_file
from scoring.in_parts import PartsResult, listing_in_parts, score_in_parts
from scoring.jobs.job import JobResult, claim_folder, folder_name, run_job
from scoring.parts.job import clear_parts
from scoring.requests import LOCAL, ComparisonRequest, Execution, JobSettings, ScoreRequest
from scoring.runners.local import auto_batch
from scoring.runners.runner import Runner
from scoring.runtimes import Conditions, choose_runtime

log = logging.getLogger(__name__)

# What the terminal shows of the table; the CSV and the page hold all.
SHOWN = (
    "model",
    "failed",
    "AP",
    "AP50",
    "mask_AP",
    "mask_AP50",
    "matched_IoU",
    "correct",
    "missed",
    "false",
    "images/s",
    "MB",
)


@dataclass(frozen=True)
class Compared:
    """What a comparison left.

    Attributes:
        table: a row for each version, of the metrics that are held against each other.
        pairs: each of the others against the first.
        report: the page; None where none was written.
        run_id: of the MLflow run; None where there is none.
        views: label -> the command that shows its images one by one.
    """

    table: pd.DataFrame
    pairs: Sequence[Pair] = ()
    report: Path | None = None
    run_id: str | None = None
    views: Mapping[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What a script asks for, as plain values."""
        return {
            "report": self.report,
            "run_id": self.run_id,
            "versions": self.table.to_dict("records"),
            "differences": [{**asdict(pair), "verdict": pair.verdict} for pair in self.pairs],
            "views": self.views,
        }


def compare_targets(registry: Registry, request: ComparisonRequest, display: Display = SILENT) -> Compared:
    """Gather, compare, write and log; crop segmenters, which find nothing, end in a table of their runs.

    Raises:
        PlanesError: targets that cannot be used, or that are over different images.
    """
    claim_folder(Path(request.out))
    named = {text: registry.group(text) for text in request.targets}
    request = replace(request, targets=tuple(_members_once(named, request.targets)))
    runs = {t: mlflow_log.load_scored(registry.client, t) for t in request.targets if is_run(t)}
    if request.data is None and not runs:
        raise DataError("give --data: only scoring runs know what they were made on")
    for run in runs.values():
        if run.leaves_out:
            notice = "was scored by a release that left them out of its metrics; score it anew to have metrics of its own"
            log.info(f"{run.label}: {run.failed} images failed, and it {notice}")
    if runs and len(runs) == len(request.targets) and _same(list(runs.values())):
        logged = comparison_table(list(runs.values()))
        log.info(render(logged))
        if any("IoU" in r.metrics for r in runs.values()):
            return Compared(logged)
    category = _category(registry, request, runs)
    opened = open_dataset(request.data, request.split, category=category, keep=True) if request.data else None
    dataset = opened or data_of(list(runs.values()))
    if not dataset.has_truth or not dataset.planes:
        raise DataError(f"{dataset.name}/{dataset.split}: no annotated planes to compare against")
    log.info(dataset.summary())
    device = pick_device(request.device)
    settings = JobSettings(score_threshold=request.score_threshold)

    def score(target: str) -> Candidate:
        version = registry.resolve(target)
        folder = registry.fetch(version)
        if read_spec(folder).kind == "segmenter":
            raise DataError(f"{version.label}: outlines given boxes and finds none; score it and compare its runs")
        _, job = score_version(
            registry,
            version,
            folder,
            dataset,
            out=Path(request.out),
            settings=settings,
            device=device,
            display=display,
        )
        check_logged([job])
        return from_job(job)

    candidates = gather(registry.client, request.targets, dataset, runs=runs, score=score)
    labels = dict(zip(request.targets, (c.label for c in candidates), strict=True))
    groups = {text: [labels[one] for one in members] for text, members in named.items()}
    grouped = any(members != [text] for text, members in named.items())
    compared = finish(registry, candidates, dataset, Path(request.out), groups if grouped else {})
    log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, compared.run_id)}")
    return compared


def _members_once(named: Mapping[str, Sequence[str]], targets: Sequence[str]) -> list[str]:
    """The targets with the members of groups in their place: what a group holds is there once, whoever names it too."""
    grouped = {one for text, members in named.items() if list(members) != [text] for one in members}
    chosen: list[str] = []
    for text in targets:
        chosen += [one for one in named[text] if one not in grouped or one not in chosen]
    return chosen


def _category(registry: Registry, request: ComparisonRequest, runs: Mapping[str, Scored]) -> str:
    """The one class that all targets find; what files of predictions find is known of jobs, else given by the user."""
    known: dict[str, str] = {}
    for target in request.targets:
        if target in runs:
            known[target] = runs[target].category
        elif is_file_of_predictions(target):
            of_job = category_of_file(file_of(target)) if request.category == "auto" else request.category
            known |= {target: of_job} if of_job else {}
        else:
            known[target] = category_of(registry.fetch(registry.resolve(target)), target)
    return common_category(known, "compare")


def resolve_all(registry: Registry, models: Sequence[str]) -> list[tuple[Resolved, Path]]:
    """The versions that are named, each once, with their saved folders.

    Raises:
        PlanesError: one that does not exist or cannot be fetched; two folders of one name.
    """
    chosen: dict[object, tuple[Resolved, Path]] = {}
    for text in dict.fromkeys(models):
        version = registry.resolve(text)
        key = version.label if version.name else str(version.folder.resolve() if version.folder else text)
        if key in chosen:
            log.info(f"{text} is {version.label}, which is named already: scored once")
            continue
        other = next((v for v, _ in chosen.values() if v.label == version.label), None)
        if other is not None:
            raise RegistryError(
                f"{text} and {other.text}: both are called {version.label}; score them into different --out"
            )
        chosen[key] = version, registry.fetch(version)
    return list(chosen.values())


def open_for(
    versions: Sequence[tuple[Resolved, Path]], data: str, *, split: str, scene_pattern: str | None
) -> list[Dataset]:
    """The data set as each version is measured on it: with the annotations of its class.

    Raises:
        PlanesError: nothing usable there, no such class, or a version of several classes over annotated data.
    """
    opened: dict[str, Dataset] = {}
    datasets = []
    for version, folder in versions:
        category = category_of(folder, version.label, measured=False)
        if category not in opened:
            opened[category] = open_dataset(data, split, category=category, scene_pattern=scene_pattern, keep=True)
        category_of(folder, version.label, measured=opened[category].has_truth)
        datasets.append(opened[category])
    return datasets


def _same(runs: Sequence[Scored]) -> bool:
    return len({r.digest for r in runs}) == 1


def score(registry: Registry, request: ScoreRequest, display: Display = SILENT) -> Sequence[JobResult | PartsResult]:
    """Score a data set with each of the versions; with ground truth measure and compare them.

    A job that was interrupted is gone on with, one that is done already is not done again.

    Returns:
        What each version's job left, in the order of the models: of jobs in parts the sums, see `scoring.in_parts`.

    Raises:
        PlanesError: versions or data that cannot be used, outputs of another job in the folder, or scorings that
            the store did not take (they are kept, and the same call logs them).
    """
    check_names([request.out], "--out")
    out = Path(request.out)
    if not is_url(request.out):
        claim_folder(out)
    execution = request.execution
    # A cluster may have what this machine has not.
    elsewhere = execution.address and request.device != "auto"
    device = request.device if elsewhere else pick_device(request.device)
    # What cannot be had is reported before anything is scored.
    versions = resolve_all(registry, request.models)
    parse_rendering(request.settings.value_range, request.settings.bands)
    thresholds = [_threshold(request, version, folder) for version, folder in versions]
    listing = listing_in_parts(request, [version.label for version, _ in versions])
    if listing is not None:
        parts = score_in_parts(registry, request, versions, listing, device=device, thresholds=thresholds, display=display)
        check_logged(parts)
        _tell_link(registry, parts)
        return parts
    datasets = open_for(versions, request.data, split=request.split, scene_pattern=request.scene_pattern)
    for dataset in {id(d): d for d in datasets}.values():
        log.info(dataset.summary())
    chosen = [
        choose_runtime(
            registry,
            version,
            folder,
            runtime=request.runtime,
            now=Conditions(
                device=device,
                precision=request.settings.precision,
                job=out / folder_name(version.label),
                elsewhere=bool(execution.address),
                fresh=request.settings.fresh,
            ),
        )
        for version, folder in versions
    ]
    runs = [
        score_version(
            registry,
            version,
            one.folder,
            dataset,
            out=out,
            settings=replace(
                request.settings,
                runtime=one.name,
                precision=one.precision or request.settings.precision,
                score_threshold=threshold,
            ),
            device=device,
            execution=execution,
            display=display,
        )
        for (version, _), one, dataset, threshold in zip(versions, chosen, datasets, thresholds, strict=True)
    ]
    _show([scored for scored, _ in runs], out)
    jobs = [job for _, job in runs]
    check_logged(jobs)
    _tell_link(registry, jobs)
    compare_jobs(registry, jobs, datasets, out)
    return jobs


def _tell_link(registry: Registry, jobs: Sequence[JobResult | PartsResult]) -> None:
    """Say where the run is seen; of several, or where nothing was new to be logged, the table of runs."""
    runs = [job.run_id for job in jobs]
    log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, runs[0] if len(runs) == 1 else None)}")


def _threshold(request: ScoreRequest, version: Resolved, folder: Path) -> float:
    """The least score that is kept: the one that was given, or the version's own.

    Raises:
        ModelError: it has none.
    """
    if not request.auto_threshold:
        return request.settings.score_threshold
    scores = read_spec(folder).scores
    if scores is None:
        raise ModelError(
            f"{version.label}: suggests no score threshold (it was trained without validation); give --score-threshold "
            "a number, or train it with --scores-from"
        )
    log.info(f"{version.label}: score threshold {scores.threshold:.3f}, of the best F1 on {scores.fitted_on}")
    return scores.threshold


def _show(runs: Sequence[Scored], out: Path) -> None:
    # Versions of different classes are measured against different annotations.
    categories = list(dict.fromkeys(run.category for run in runs))
    for category in categories:
        table = comparison_table([run for run in runs if run.category == category])
        log.info(render(table))
    if len(runs) > 1 and len(categories) == 1:
        table.to_csv(out / "comparison.csv", index=False)


def compare_jobs(registry: Registry, jobs: Sequence[JobResult], datasets: Sequence[Dataset], out: Path) -> None:
    """Compare what has just been scored, where there is truth; crop segmenters are left out, other classes refused."""
    chosen = [(job, dataset) for job, dataset in zip(jobs, datasets, strict=True) if not job.segmenter]
    if len(chosen) < 2 or not chosen[0][1].has_truth or not chosen[0][1].planes:
        return
    common_category({job.label: dataset.category for job, dataset in chosen}, "scored, but not compared")
    finish(registry, [from_job(job) for job, _ in chosen], chosen[0][1], out)


def finish(
    registry: Registry,
    candidates: Sequence[Candidate],
    dataset: Dataset,
    out: Path,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Compared:
    """Compare candidates; write report.html and comparison.csv; log them."""
    for earlier in ("comparison.csv", "report.html"):
        (out / earlier).unlink(missing_ok=True)
    comparison = compare(dataset, candidates, groups=groups)
    table = comparison.table(candidates)
    table.to_csv(out / "comparison.csv", index=False)
    report = _report(comparison, candidates, dataset, out)
    log.info(render(table[[name for name in SHOWN if name in table]]))
    for pair in comparison.pairs:
        interval = f" (95 % interval {pair.interval[0]:+.3f} to {pair.interval[1]:+.3f})" if pair.interval else ""
        what = "masks" if pair.kind == "segm" else "boxes"
        against = f"{pair.label} against {comparison.labels[0]}"
        log.info(f"{against}, {what}: AP {pair.difference:+.3f}{interval}: {pair.verdict}")
    for group in comparison.groups:
        what = "masks" if group.kind == "segm" else "boxes"
        spreads = ", ".join(f"{name} {group.spreads[name]}" for name in ("AP", "AP50"))
        more = ", ".join(f"{name} {group.differences[name]}" for name in ("AP", "AP50") if group.differences)
        log.info(f"{group.label}, {what}: {spreads}" + (f"; against {comparison.groups[0].label}: {more}" if more else ""))
    run_id = mlflow_log.log_comparison(registry.client, out, comparison, dataset)
    log.info(f"report: {report or 'none, matplotlib is not installed'} (run {run_id})")
    views = {c.label: view for c in candidates if (view := c.view(dataset)) is not None}
    for label, view in views.items():
        log.info(f"{label}, image by image: {view}")
    return Compared(table, comparison.pairs, report, run_id, views)


def _report(comparison: Comparison, candidates: Sequence[Candidate], dataset: Dataset, out: Path) -> Path | None:
    """The page; None where there is nothing to draw curves with, as in a scorer's environment."""
    if find_spec("matplotlib") is None:
        return None
    from scoring.comparison.report import write_report

    return write_report(comparison, candidates, dataset, out / "report.html")


def score_version(
    registry: Registry,
    version: Resolved,
    folder: Path,
    dataset: Dataset,
    *,
    out: Path,
    settings: JobSettings,
    device: str,
    execution: Execution = LOCAL,
    display: Display = SILENT,
) -> tuple[Scored, JobResult]:
    """Run one job with the version's saved folder, or its twin's, log it, and say what it left.

    `check_logged` tells whether the store took it.

    Raises:
        PlanesError: the version, the images or the folder cannot be used.
    """
    settings = replace(settings, scores=scores_of(version.label, folder, settings))
    dataset = dataset.rendered(parse_rendering(settings.value_range, settings.bands, read_spec(folder).rendering))
    predictor = load_model(folder, "cpu" if execution.runner == "ray" else device, settings.changes)
    runner = (
        _ray(folder, dataset, settings=settings, device=device, execution=execution) if execution.runner == "ray" else None
    )
    # On a terminal Ray shows its own bars.
    progress = pass_through if runner and sys.stderr.isatty() else display.items
    # As long as it always was in manifests, so that older jobs can be gone on with.
    digest = folder_digest(folder)[:16]
    if settings.fresh:
        clear_parts(out / folder_name(version.label))
    job = run_job(
        predictor,
        version.label,
        dataset,
        out,
        settings=settings,
        progress=progress,
        model=digest,
        device=device,
        runner=runner,
    )
    job.megabytes = folder_megabytes(folder)
    _tell(job)
    tiling = tiling_of(predictor)
    params = {
        **{k: v for k, v in settings.__dict__.items() if k != "scores"},
        "batch_size": settings.batch_size or auto_batch(device),
        **execution.__dict__,
    }
    params |= {"tiling": tiling.model_dump_json() if tiling else "whole images"}
    params |= {"range": dataset.rendering.range, "bands": dataset.rendering.bands or "auto"}
    params |= {"device": device, "data": str(dataset.source)}
    name = f"{dataset.name}/{dataset.split}"
    scored = Scored(
        job.label,
        name,
        dataset.digest(),
        job.metrics,
        job.images,
        job.seconds,
        category=dataset.category,
        failed=job.failures,
    )
    if job.unchanged:
        log.info(f"   nothing new: outputs in {job.folder} are as they were logged")
        return scored, job
    try:
        job.run_id = mlflow_log.log_job(registry.client, job, version, dataset, params=params, megabytes=job.megabytes)
        log.info(f"   outputs in {job.folder}, run {job.run_id}")
    except Exception as error:
        if os.environ.get("PLANES_TRACEBACK"):
            raise
        # What was scored is on disk; a store that is away must not keep the next model from being scored.
        job.unlogged = one_line(error, 200)
        log.info(f"   outputs in {job.folder}; NOT LOGGED: {job.unlogged}")
    return scored, job


class NotLogged(RegistryError):
    """The store did not take some of the scorings ``jobs``, whose outputs are there."""

    def __init__(self, message: str, jobs: Sequence[JobResult | PartsResult]) -> None:
        super().__init__(message)
        self.jobs = jobs


def check_logged(jobs: Sequence[JobResult | PartsResult]) -> None:
    """Say which scorings the store did not take.

    Raises:
        NotLogged: there are some.
    """
    lost = [job for job in jobs if job.unlogged]
    if lost:
        what = ", ".join(job.label for job in lost)
        denied = "permission denied" in str(lost[0].unlogged).lower()
        hint = " with MLFLOW_EXPERIMENT_NAME set to an experiment of your own" if denied else ""
        raise NotLogged(
            f"{what}: scored, but not logged ({lost[0].unlogged}); the outputs are kept, and the same command{hint} "
            "logs them without scoring again",
            jobs,
        )


def _ray(folder: Path, dataset: Dataset, *, settings: JobSettings, device: str, execution: Execution) -> Runner:
    from scoring.runners.ray_runner import RayRunner

    return RayRunner(folder, ray_settings(settings, device, dataset, execution))


def _tell(job: JobResult) -> None:
    errors = f", {job.failures} failed (see errors.parquet)" if job.failures else ""
    errors += " that count as images without detections" if job.failures and job.evaluations else ""
    errors += f", {job.resumed} of them scored before" if job.resumed else ""
    speed = f"{job.seconds:.1f} s, {job.images / job.seconds:.3g} images/s"
    log.info(f"{job.label}: {job.instances} planes in {job.images} images{errors}, {speed}")
    if job.generation and not job.unchanged:
        tell_generation(job.generation)
    tell_work(job.timings, job.peaks, job.little, job.first_little)
    for _, evaluation in job.evaluations:
        if "max_dets" in evaluation.settings:
            log.info(coco_tables(evaluation))
