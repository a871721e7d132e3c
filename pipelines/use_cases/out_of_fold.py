"""What the trainings of a cross-validation predicted for the folds they never saw: one table, metrics, scenes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataError, RegistryError
from models.instances import Instances, from_rows
from models.saved.scores import Scores
from pipelines import ablation
from pipelines.data.dataset import Dataset
from pipelines.data.scene_groups import scene_folds
from pipelines.evaluation import figures
from pipelines.evaluation.by_scene import scene_metrics, worst_first
from pipelines.evaluation.calibration import fit_scores, measure_across, outcomes, reliability
from pipelines.evaluation.inference import evaluate_predictions
from pipelines.evaluation.spread import Spread
from pipelines.instance_table import write_table
from pipelines.registry.model_versions import Registry
from pipelines.tracking.mlflow_runs import store_errors
from pipelines.use_cases.publishing import PREDICTIONS_FILE

# Artefact of the parent run: calibration and suggested threshold.
SCORES_FILE = "scores.json"
TABLE_FILE = "out_of_fold.parquet"
# The metric of a scene by which scenes are ordered.
SCENE_METRIC = {"detector": "AP50", "segmenter": "IoU", "instance_segmenter": "AP50"}


def log_out_of_fold(
    results: Sequence[ablation.Result], dataset: Dataset, kind: str, prefix: str = ""
) -> dict[str, dict[str, float]]:
    """Log to the active run what a variant's trainings predicted for their folds; one that failed is left out.

    ``out_of_fold.parquet`` holds all predictions with fold, seed and scene, ``scenes.csv`` and ``figures/scenes.png``
    the scenes, the worst first. Metrics of all folds together are ``out_of_fold/NAME``: the mean over the seeds whose
    folds are all there, with ``out_of_fold_sd/NAME`` where there are several.

    Args:
        results: of one variant.
        dataset: all images, as they were parted.
        kind: detector, segmenter or instance_segmenter.
        prefix: of the artefacts, where there are several variants.

    Returns:
        Seed -> metric -> value, of the seeds whose folds are all there.

    Raises:
        RegistryError: the store refuses.
    """
    table = _table(results, dataset)
    with tempfile.TemporaryDirectory() as work:
        write_table(table, Path(work) / TABLE_FILE)
        mlflow.log_artifact(str(Path(work) / TABLE_FILE), prefix.strip("/") or None)
    by_seed: dict[str, dict[str, float]] = {}
    scenes: dict[str, dict[str, dict[str, float]]] = {}
    for seed in sorted({r.member.seed for r in results}):
        mine = [r for r in results if r.member.seed == seed]
        if any(r.run is None for r in mine) or len(mine) < mine[0].member.folds:
            continue
        predictions = from_rows(row for row in table.to_pylist() if row["seed"] == seed)
        by_seed[str(seed)] = _metrics(predictions, dataset, kind)
        failed = [r.run.data.metrics.get("test/images_failed", 0.0) for r in mine if r.run]
        by_seed[str(seed)]["images_failed"] = sum(failed)
        if kind != "segmenter":
            by_seed[str(seed)] |= _score_metrics(mine, predictions, dataset)
        scenes[str(seed)] = scene_metrics(dataset, predictions, kind)
    if by_seed:
        for name in dict.fromkeys(k for values in by_seed.values() for k in values):
            spread = Spread.of([values[name] for values in by_seed.values() if name in values])
            mlflow.log_metric(f"{prefix}out_of_fold/{name}", spread.mean)
            if spread.count > 1:
                mlflow.log_metric(f"{prefix}out_of_fold_sd/{name}", spread.sd)
        _log_scores(table, dataset, kind, list(by_seed), prefix)
        rows = _scene_rows(scenes, kind)
        mlflow.log_text(pd.DataFrame(rows).to_csv(index=False), f"{prefix}scenes.csv")
        mlflow.log_figure(figures.scene_figure(rows, SCENE_METRIC[kind]), f"{prefix}figures/scenes.png")
    return by_seed


def _table(results: Sequence[ablation.Result], dataset: Dataset) -> pa.Table:
    scenes = {s.image_id: s.scene for s in dataset.samples}
    tables = []
    for result in results:
        if result.run is None or not any(k.startswith("test/") for k in result.run.data.metrics):
            # A fold on which nothing can be measured, such as one without outlines, has no predictions.
            continue
        what = f"run {result.run.info.run_id}: {PREDICTIONS_FILE} cannot be read"
        what += "; delete that run in MLflow, and the same command trains its fold again"
        with tempfile.TemporaryDirectory() as work, store_errors(what, OSError, pa.ArrowException):
            path = mlflow.artifacts.download_artifacts(
                run_id=result.run.info.run_id, artifact_path=PREDICTIONS_FILE, dst_path=work
            )
            table = pq.read_table(path, partitioning=None)
        more: dict[str, Any] = {"fold": result.member.fold, "seed": result.member.seed}
        for name, value in more.items():
            table = table.append_column(name, pa.array([value] * table.num_rows, pa.int32()))
        names = [scenes.get(i) for i in table["image_id"].to_pylist()]
        if None in names:
            raise RegistryError(f"run {result.run.info.run_id}: predictions for an image that the data has not")
        tables.append(table.append_column("scene", pa.array(names, pa.string())))
    if not tables:
        raise DataError("no fold could be measured: their planes have no outlines, or none of their images can be read")
    return pa.concat_tables(tables)


def _metrics(predictions: list[Instances], dataset: Dataset, kind: str) -> dict[str, float]:
    evaluations = evaluate_predictions(predictions, dataset, kind == "segmenter")
    return {prefix + k: v for prefix, e in evaluations for k, v in e.finite().items()}


def _score_metrics(results: Sequence[ablation.Result], predictions: list[Instances], dataset: Dataset) -> dict[str, float]:
    """Calibration and suggested threshold, each fold judged by what was fitted on the others."""
    parts = scene_folds(dataset, results[0].member.folds)
    folds = {s.image_id: number for number, part in enumerate(parts, start=1) for s in part.samples}
    found = outcomes(dataset, predictions)
    of_image = np.array([folds[s.image_id] for s in dataset.samples])
    planes = {number: part.planes for number, part in enumerate(parts, start=1)}
    return {k: v for k, v in measure_across(found, of_image[found.images], planes).items() if math.isfinite(v)}


def _log_scores(table: pa.Table, dataset: Dataset, kind: str, seeds: Sequence[str], prefix: str) -> None:
    """What scores mean by all folds of the first seed, for a version that is trained on all images."""
    run = mlflow.active_run()
    if kind == "segmenter" or run is None:
        return
    predictions = from_rows(row for row in table.to_pylist() if str(row["seed"]) == seeds[0])
    found = outcomes(dataset, predictions)
    scores = fit_scores(found, f"out of fold, {len(dataset)} images, run {run.info.run_id}")
    if scores is not None:
        mlflow.log_text(scores.model_dump_json(indent=2) + "\n", f"{prefix}{SCORES_FILE}")
        before, after = (reliability(v, found.correct) for v in (found.scores, scores.probability(found.scores)))
        title = f"out of fold: {len(found.scores)} detections"
        mlflow.log_figure(figures.reliability_figure(before, after, title), f"{prefix}figures/reliability.png")


def read_scores(registry: Registry, run_id: str) -> Scores:
    """What the scores of a recipe's versions mean by the folds of a training with ``--folds``.

    Raises:
        RegistryError: no such run, or it holds nothing of the kind.
    """
    what = f"run {run_id}: holds no {SCORES_FILE}; give the parent run of a training with --folds that found some planes"
    with tempfile.TemporaryDirectory() as work, store_errors(what, OSError):
        path = registry.client.download_artifacts(run_id, SCORES_FILE, work)
        return Scores.model_validate_json(Path(path).read_text())


def _scene_rows(scenes: dict[str, dict[str, dict[str, float]]], kind: str) -> list[dict[str, Any]]:
    """Rows of scenes.csv: scene, images, planes, each metric's mean over seeds, and its standard deviation if several."""
    first = next(iter(scenes.values()))
    means = {name: {k: Spread.of([seed[name][k] for seed in scenes.values()]) for k in first[name]} for name in first}
    order = worst_first({n: {k: s.mean for k, s in v.items()} for n, v in means.items()}, SCENE_METRIC[kind])
    rows = []
    for name in order:
        row: dict[str, Any] = {"scene": name}
        for metric, spread in means[name].items():
            row[metric] = int(spread.mean) if metric in ("images", "planes") else spread.mean
            if len(scenes) > 1 and metric not in ("images", "planes"):
                row[f"{metric}_sd"] = spread.sd
        rows.append(row)
    return rows
