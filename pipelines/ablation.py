"""Ablation: variants of a recipe, their runs under one parent in MLflow, the table of results."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from models.errors import RecipeError
from pipelines.evaluation.spread import Spread, difference

PARENT = "mlflow.parentRunId"
KEY = "ablation_key"
# Tag of a parent run that found an equal one finished: that one.
SAME = "same_as"

# Columns of the table after the deciding metric, for runs that have them.
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mask_AP", "mask_AP50", "IoU", "Dice", "at_0.6_AP", "at_0.6_mask_AP")


@dataclass(frozen=True)
class Variant:
    """One setting of the ablation: ``key=value`` overrides of the recipe."""

    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """Short name for run, table and chart.

        >>> Variant(("optimizer.lr=0.001", "opts.SOLVER.MAX_ITER=500")).label
        'lr=0.001 MAX_ITER=500'
        """
        pairs = (override.partition("=") for override in self.overrides)
        return " ".join(f"{key.split('.')[-1]}={value}" for key, _, value in pairs)


@dataclass(frozen=True)
class Member:
    """One of the trainings that a variant is repeated in: its seed, and which of how many folds it is measured on.

    >>> Member(3, 2, 5).label, Member(3).label
    ('fold 2/5 seed 3', 'seed 3')
    """

    seed: int
    fold: int = 0
    folds: int = 0

    @property
    def label(self) -> str:
        """Short name for run and table."""
        return f"fold {self.fold}/{self.folds} seed {self.seed}" if self.fold else f"seed {self.seed}"


def members(seed: int, seeds: int, folds: int) -> list[Member]:
    """All seeds from ``seed`` upwards, each over all folds, if any."""
    return [Member(s, f, folds) for s in range(seed, seed + seeds) for f in (range(1, folds + 1) if folds else (0,))]


@dataclass(frozen=True)
class Result:
    """Result of one training of a variant: its run, and the error where it failed; ``version`` where it is registered."""

    variant: Variant
    run: Run | None
    error: str = ""
    member: Member = Member(0)
    version: str | None = None


def make_variants(grid: Sequence[str], listed: Sequence[str]) -> list[Variant]:
    """All combinations of ``key=v1,v2`` entries, or the listed ``key=v key=v`` variants.

    >>> [v.label for v in make_variants(["lr=1e-3,1e-4", "steps=10,20"], [])]
    ['lr=1e-3 steps=10', 'lr=1e-3 steps=20', 'lr=1e-4 steps=10', 'lr=1e-4 steps=20']
    >>> [v.label for v in make_variants([], ["lr=1e-3 steps=10; lr=1e-4"])]
    ['lr=1e-3 steps=10', 'lr=1e-4']

    Raises:
        RecipeError: neither or both, an entry without values, equal variants, or only one.
    """
    axes = [axis(entry) for text in grid for entry in shlex.split(text)]
    texts = [variant.strip() for text in listed for variant in text.split(";") if variant.strip()]
    if bool(axes) == bool(texts):
        raise RecipeError('give either --grid "optimizer.lr=0.001,0.0005" or --variants "steps=100; steps=500 lr=0.001"')
    chosen = (
        [Variant(tuple(v)) for v in itertools.product(*axes)] if axes else [Variant(tuple(shlex.split(t))) for t in texts]
    )
    if len(set(chosen)) < len(chosen):
        raise RecipeError("two variants of the ablation are equal")
    if len(chosen) < 2:
        raise RecipeError(f"an ablation needs at least two variants, found only {chosen[0].label}")
    return chosen


AS_THE_RECIPE = Variant(())


def axis(entry: str) -> list[str]:
    """The overrides of a grid's entry ``key=v1,v2``; a comma inside brackets parts nothing.

    Raises:
        RecipeError: it is none.
    """
    key, sign, values = entry.partition("=")
    choices, depth, start = [], 0, 0
    for i, letter in enumerate(values):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            choices.append(values[start:i])
            start = i + 1
    choices.append(values[start:])
    if not sign or not key or not all(c.strip() for c in choices):
        raise RecipeError(f"--grid {entry!r}: expected key=value,value")
    return [f"{key}={choice.strip()}" for choice in choices]


def ablation_key(keys: Sequence[str]) -> str:
    """Digest of the variants' training keys: two ablations are the same one if it is equal."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()[:12]


def find_parent(client: MlflowClient, key: str, but_not: str | None = None) -> Run | None:
    """The newest parent run of this ablation, if there is one besides ``but_not``."""
    experiments = [e.experiment_id for e in client.search_experiments(max_results=1000)]
    runs = client.search_runs(experiments, f"tags.{KEY} = '{key}'", order_by=["attributes.start_time DESC"])
    # One that was but another name of an earlier one has no children.
    return next((run for run in runs if run.info.run_id != but_not and SAME not in run.data.tags), None)


def adopt_children(client: MlflowClient, old: Run, parent_id: str) -> int:
    """Move the runs of an unfinished ablation under another parent and delete the old one; returns how many.

    MLflow keeps deleted runs restorable; the old parent held nothing that the new one does not.
    """
    children = client.search_runs([old.info.experiment_id], f"tags.`{PARENT}` = '{old.info.run_id}'")
    for child in children:
        client.set_tag(child.info.run_id, PARENT, parent_id)
    client.set_tag(old.info.run_id, "continued_in", parent_id)
    client.delete_run(old.info.run_id)
    return len(children)


def finished_child(client: MlflowClient, parent_id: str, training_key: str) -> Run | None:
    """The finished run of a variant under its parent, if there is one."""
    experiment = client.get_run(parent_id).info.experiment_id
    condition = f"tags.`{PARENT}` = '{parent_id}' and tags.training_key = '{training_key}' and status = 'FINISHED'"
    return next(iter(client.search_runs([experiment], condition)), None)


def end_lost_children(client: MlflowClient, parent_id: str, training_key: str, current: str | None) -> None:
    """End runs of a training that nothing will go on with: its folder, which named them, is gone."""
    experiment = client.get_run(parent_id).info.experiment_id
    condition = f"tags.`{PARENT}` = '{parent_id}' and tags.training_key = '{training_key}' and status = 'RUNNING'"
    for run in client.search_runs([experiment], condition):
        if run.info.run_id != current:
            client.set_terminated(run.info.run_id, "KILLED")


def deciding_metric(results: Sequence[Result], main: str) -> str:
    """The metric by which variants are ranked: on validation where there is one, else on the test set.

    A variant chosen by its test metric would owe some of it to the choice. Folds are measured on what was held back, as
    the test set, which is in some fold too.
    """
    if any(r.member.folds for r in results):
        return f"test/{main}"
    names = [name for r in results if r.run for name in r.run.data.metrics]
    return next((n for n in (f"val/best_{main}", f"test/{main}") if n in names), f"test/{main}")


def by_variant(results: Sequence[Result]) -> dict[Variant, list[Result]]:
    """The results of each variant, in the order in which they came."""
    groups: dict[Variant, list[Result]] = {}
    for result in results:
        groups.setdefault(result.variant, []).append(result)
    return groups


def values_of(results: Sequence[Result], metric: str) -> dict[str, float]:
    """A metric of each training by the training's label, of those that have it."""
    return {r.member.label: r.run.data.metrics[metric] for r in results if r.run and metric in r.run.data.metrics}


def compared_by(results: Sequence[Result], metric: str) -> dict[str, float]:
    """A metric by what variants are compared over: by fold, each the mean over its seeds, if there are any; by seed."""
    if not any(r.member.folds for r in results):
        return values_of(results, metric)
    folds: dict[str, list[float]] = {}
    for result in results:
        if result.run and metric in result.run.data.metrics:
            folds.setdefault(f"fold {result.member.fold}", []).append(result.run.data.metrics[metric])
    return {fold: Spread.of(values).mean for fold, values in folds.items()}


def best_variant(results: Sequence[Result], metric: str) -> Variant | None:
    """The variant with the highest mean of a metric.

    One of whose trainings some failed is none, unless some of all did: it may have been spared the hard folds.
    """
    groups = {v: g for v, g in by_variant(results).items() if values_of(g, metric)}
    whole = {v: g for v, g in groups.items() if all(r.run is not None for r in g)} or groups
    means = {v: Spread.of(list(values_of(g, metric).values())).mean for v, g in whole.items()}
    return max((v for v in means if math.isfinite(means[v])), key=means.__getitem__, default=None)


def result_rows(results: Sequence[Result], metric: str) -> list[dict[str, Any]]:
    """Rows of the table: variant, its overrides, the deciding metric, other metrics, loss, seconds, runs.

    Of a variant with several trainings a metric is their mean, with its standard deviation beside it (``_sd``), and
    ``against the best`` says whether the best variant's lead is more than their noise.
    """
    groups = by_variant(results)
    keys = list(dict.fromkeys(o.partition("=")[0] for variant in groups for o in variant.overrides))
    repeated = any(len(group) > 1 for group in groups.values())
    best = best_variant(results, metric)
    columns = [metric, *(prefix + name for prefix in ("test/", "val/best_") for name in SHOWN)]
    columns = [c for c in dict.fromkeys(columns) if c == metric or any(values_of(g, c) for g in groups.values())]
    rows = []
    for variant, group in groups.items():
        given = dict(o.split("=", 1) for o in variant.overrides)
        row: dict[str, Any] = {"variant": variant.label, **{k: given.get(k, "") for k in keys}}
        for column in columns:
            spread = Spread.of(list(values_of(group, column).values()))
            row[column] = spread.mean
            if repeated:
                row[f"{column}_sd"] = spread.sd
        if repeated:
            row["trainings"] = sum(r.run is not None for r in group)
            if len(groups) > 1 and best is not None:
                folds = group[0].member.folds
                lag = difference(compared_by(groups[best], metric), compared_by(group, metric), folds=folds)
                row["against the best"] = "the best" if variant == best else str(lag)
        for name, column in (("train/loss", "train/loss"), ("seconds", "wall_seconds")):
            row[name] = Spread.of(list(values_of(group, column).values())).mean
        row["run_id"] = " ".join(r.run.info.run_id for r in group if r.run)
        rows.append({**row, "error": "; ".join(r.error for r in group if r.error)})
    return rows


def training_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each training: variant, seed, fold, version, all metrics of its evaluation, run, error."""
    rows: list[dict[str, Any]] = []
    for result in results:
        row: dict[str, Any] = {"variant": result.variant.label, "seed": result.member.seed}
        row |= {"fold": result.member.fold} if result.member.folds else {}
        row |= {"version": result.version} if result.version else {}
        values = result.run.data.metrics if result.run else {}
        row |= {k: v for k, v in sorted(values.items()) if k.startswith(("test/", "val/best_"))}
        row |= {"seconds": values.get("wall_seconds", math.nan)}
        rows.append({**row, "run_id": result.run.info.run_id if result.run else "", "error": result.error})
    columns = list(dict.fromkeys(k for row in rows for k in row))
    return [{k: row.get(k, math.nan) for k in columns} for row in rows]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV text; unknown values stay empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def curves(client: MlflowClient, result: Result, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric of a variant's run."""
    if result.run is None:
        return [], []
    points = sorted(client.get_metric_history(result.run.info.run_id, name), key=lambda p: p.step)
    return [p.step for p in points], [p.value for p in points]
