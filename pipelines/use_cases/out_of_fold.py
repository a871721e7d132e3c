"""What the trainings of a cross-validation predicted for the folds they never saw: one table, metrics, scenes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import RegistryError
from models.instances import Instances, from_rows
from pipelines import ablation
from pipelines.data.dataset import Dataset
from pipelines.evaluation import figures
from pipelines.evaluation.by_scene import scene_metrics, worst_first
from pipelines.evaluation.inference import evaluate_predictions
from pipelines.evaluation.spread import Spread
from pipelines.instance_table import write_table
from pipelines.tracking.mlflow_runs import store_errors
from pipelines.use_cases.publishing import PREDICTIONS_FILE

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
        scenes[str(seed)] = scene_metrics(dataset, predictions, kind)
    if by_seed:
        for name in dict.fromkeys(k for values in by_seed.values() for k in values):
            spread = Spread.of([values[name] for values in by_seed.values() if name in values])
            mlflow.log_metric(f"{prefix}out_of_fold/{name}", spread.mean)
            if spread.count > 1:
                mlflow.log_metric(f"{prefix}out_of_fold_sd/{name}", spread.sd)
        rows = _scene_rows(scenes, kind)
        mlflow.log_text(pd.DataFrame(rows).to_csv(index=False), f"{prefix}scenes.csv")
        mlflow.log_figure(figures.scene_figure(rows, SCENE_METRIC[kind]), f"{prefix}figures/scenes.png")
    return by_seed


def _table(results: Sequence[ablation.Result], dataset: Dataset) -> pa.Table:
    scenes = {s.image_id: s.scene for s in dataset.samples}
    tables = []
    for result in results:
        if result.run is None:
            continue
        what = f"run {result.run.info.run_id}: {PREDICTIONS_FILE} cannot be read; --fresh trains it anew"
        with tempfile.TemporaryDirectory() as work, store_errors(what, OSError, pa.ArrowException):
            path = mlflow.artifacts.download_artifacts(
                run_id=result.run.info.run_id, artifact_path=PREDICTIONS_FILE, dst_path=work
            )
            table = pq.read_table(path)
        more: dict[str, Any] = {"fold": result.member.fold, "seed": result.member.seed}
        for name, value in more.items():
            table = table.append_column(name, pa.array([value] * table.num_rows, pa.int32()))
        names = [scenes.get(i) for i in table["image_id"].to_pylist()]
        if None in names:
            raise RegistryError(f"run {result.run.info.run_id}: predictions for an image that the data has not")
        tables.append(table.append_column("scene", pa.array(names, pa.string())))
    return pa.concat_tables(tables)


def _metrics(predictions: list[Instances], dataset: Dataset, kind: str) -> dict[str, float]:
    evaluations = evaluate_predictions(predictions, dataset, kind == "segmenter")
    return {prefix + k: v for prefix, e in evaluations for k, v in e.finite().items()}


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
