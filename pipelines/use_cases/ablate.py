"""Variants of a recipe trained as child runs of one parent, with a table and a chart."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.tracking import MlflowClient

from models.errors import ModelError, PlanesError, one_line
from pipelines import ablation
from pipelines.evaluation import figures
from pipelines.evaluation.inference import MAIN_METRIC
from pipelines.evaluation.metrics import check_metric
from pipelines.locking import held, lock_of
from pipelines.recipes.reading import load_recipe
from pipelines.registry.model_versions import Registry
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.display import SILENT, Display
from pipelines.use_cases.requests import AblationRequest, TrainingRequest
from pipelines.use_cases.training import KIND, Plan, plan_training, run_plan

log = logging.getLogger(__name__)


def ablate(registry: Registry, request: AblationRequest, display: Display = SILENT) -> list[ablation.Result]:
    """Plan all variants first, then train those that have no finished run; one that fails does not stop the others.

    Raises:
        PlanesError: recipe, variants or data that cannot be used, every variant failed, or an
            equal ablation is going on.
    """
    return ablate_planned(registry, plan_ablation(request), display)


@dataclass(frozen=True)
class AblationPlan:
    """An ablation that is ready to start; ``key`` is a digest of its variants' trainings."""

    request: AblationRequest
    variants: Sequence[ablation.Variant]
    plans: Sequence[Plan]
    key: str
    main_metric: str


def plan_ablation(request: AblationRequest) -> AblationPlan:
    """Read recipe, variants and data; nothing is written yet.

    Raises:
        PlanesError: recipe, variants or data that cannot be used.
    """
    variants = ablation.make_variants(request.grid, request.variants)
    task = load_recipe(request.recipe, engine=request.engine).task
    main_metric = MAIN_METRIC[KIND[task]] if request.metric == "auto" else request.metric
    check_metric(main_metric, KIND[task])
    plans = [plan_training(_request(request, task, v)) for v in variants]
    key = ablation.ablation_key([p.key for p in plans])
    return AblationPlan(request, variants, plans, key, main_metric)


def ablate_planned(registry: Registry, plan: AblationPlan, display: Display = SILENT) -> list[ablation.Result]:
    """Train the variants that have no finished run, one after the other.

    Raises:
        PlanesError: every variant failed, or an equal ablation is going on.
    """
    name = plan.request.name
    with held(lock_of(Path(plan.request.work_dir) / f"{name}-{plan.key}"), f"an equal ablation of {name}"):
        return _ablate(registry, plan, display)


def _ablate(registry: Registry, plan: AblationPlan, display: Display) -> list[ablation.Result]:
    request, plans, key, main_metric = plan.request, plan.plans, plan.key, plan.main_metric
    # Under `mlflow run` the given run is the parent, not a variant's.
    given = os.environ.get("MLFLOW_RUN_ID")
    earlier = None if request.fresh else ablation.find_parent(registry.client, key, given)
    tags = {"task": "ablate", "recipe": plans[0].recipe.name, ablation.KEY: key}
    title = f"ablate {plans[0].recipe.name}: {len(plans)} variants"
    with mlflow_runs.tracked_run(registry.client, title, tags, resume_id=earlier.info.run_id if earlier else None) as run:
        parent = _parent_of_children(registry.client, run.info.run_id, earlier)
        os.environ.pop("MLFLOW_RUN_ID", None)
        texts = {k: " ".join(getattr(request, k)) for k in ("grid", "variants", "overrides")}
        mlflow_runs.log_params({**request.__dict__, **texts, "engine": plans[0].recipe.engine, "metric": main_metric})
        results: list[ablation.Result] = []
        for variant, training in zip(plan.variants, plans, strict=True):
            results.append(
                _one(registry, variant, training, parent=parent, number=f"{len(results) + 1}/{len(plans)}", display=display)
            )
            _log(registry.client, results, main_metric)
        if all(r.run is None for r in results):
            raise ModelError(f"every variant failed; the first: {results[0].error}")
        _show(results, main_metric)
        log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, run.info.run_id)}")
    return results


def _request(request: AblationRequest, task: str, variant: ablation.Variant) -> TrainingRequest:
    return TrainingRequest(
        task=task,
        recipe=request.recipe,
        data=request.data,
        register_as=request.name,
        device=request.device,
        overrides=(*request.overrides, *variant.overrides),
        engine=request.engine,
        work_dir=request.work_dir,
        register=False,
        label=variant.label,
    )


def _parent_of_children(client: MlflowClient, run_id: str, earlier: Any) -> str:
    """The run under which the variants' runs are: an unfinished earlier ablation's are taken over."""
    if earlier is None or earlier.info.run_id == run_id:
        return run_id
    if earlier.info.status == "FINISHED":
        mlflow.set_tag("same_as", earlier.info.run_id)
        return str(earlier.info.run_id)
    count = ablation.adopt_children(client, earlier, run_id)
    log.info(f"going on with an ablation that was stopped; {count} runs taken over")
    return run_id


def _one(
    registry: Registry, variant: ablation.Variant, plan: Plan, *, parent: str, number: str, display: Display
) -> ablation.Result:
    title = f"variant {number} {variant.label}"
    done = ablation.finished_child(registry.client, parent, plan.key)
    if done is not None:
        log.info(f"== {title}: done already (run {done.info.run_id})")
        return ablation.Result(variant, done)
    log.info(f"== {title}")
    os.environ["PLANES_PARENT_RUN_ID"] = parent
    try:
        trained = run_plan(registry, plan, display)
    except PlanesError as error:
        log.warning(f"{title} failed: {one_line(error)}")
        return ablation.Result(variant, None, one_line(error))
    finally:
        os.environ.pop("PLANES_PARENT_RUN_ID", None)
    return ablation.Result(variant, registry.client.get_run(trained.run_id))


def _log(client: MlflowClient, results: list[ablation.Result], main_metric: str) -> None:
    """Table and chart of what is there so far, on the parent."""
    metric = ablation.deciding_metric(results, main_metric)
    rows = ablation.result_rows(results, metric)
    mlflow.log_text(ablation.as_csv(rows), "ablation.csv")
    bars = [(r.variant.label, row[metric]) for r, row in zip(results, rows, strict=True)]
    losses = {r.variant.label: ablation.curves(client, r, "train/loss") for r in results}
    validation = {r.variant.label: ablation.curves(client, r, f"val/{main_metric}") for r in results}
    mlflow.log_figure(
        figures.ablation_figure(bars, metric, losses, validation, f"val/{main_metric}"), "figures/ablation.png"
    )
    known = [(value, label) for label, value in bars if value == value]
    if known:
        best, label = max(known)
        mlflow.log_metric(f"best/{metric}", best)
        mlflow.set_tag("best_variant", label)


def _show(results: list[ablation.Result], main_metric: str) -> None:
    metric = ablation.deciding_metric(results, main_metric)
    table = pd.DataFrame(ablation.result_rows(results, metric)).drop(columns="variant")
    if not table["error"].any():
        table = table.drop(columns="error")
    log.info(table.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))
