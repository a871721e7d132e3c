"""What the training entry points share: plan, train, say what came out."""

from __future__ import annotations

from collections.abc import Sequence

import click

from models.errors import RecipeError
from pipelines.ablation import Result
from pipelines.evaluation.inference import MAIN_METRIC
from pipelines.registry.model_versions import Registry
from pipelines.steps.cli_support import TERMINAL
from pipelines.steps.reporting import record
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.requests import AblationRequest, TrainingRequest
from pipelines.use_cases.training import KIND, Trained, plan_training, train_plan


def run_training(request: TrainingRequest, *, folds: int = 0, seeds: int = 1) -> None:
    """Train and register, or train with several seeds or over folds; mistakes are reported before a run is made.

    Raises:
        PlanesError: recipe, data, weights, engine or store that cannot be used.
    """
    if folds and request.scores_from:
        raise RecipeError("--scores-from is for versions; a training with --folds makes none")
    if folds or seeds > 1:
        _run_repeated(request, folds, seeds)
        return
    plan = plan_training(request)
    registry = Registry.connect()
    report(registry, train_plan(registry, plan, TERMINAL))


def _run_repeated(request: TrainingRequest, folds: int, seeds: int) -> None:
    from pipelines.use_cases.ablate import ablate_planned, plan_ablation

    repeated = AblationRequest(
        recipe=request.recipe,
        data=request.data,
        name=request.register_as,
        device=request.device,
        overrides=request.overrides,
        engine=request.engine,
        work_dir=request.work_dir,
        fresh=request.fresh,
        folds=folds,
        seeds=seeds,
        task=request.task,
        register=True,
        num_gpus=request.num_gpus,
        scores_from=request.scores_from,
    )
    plan = plan_ablation(repeated, TERMINAL)
    record_trainings(ablate_planned(Registry.connect(), plan, TERMINAL))


def record_trainings(results: Sequence[Result]) -> None:
    """Keep what an ablation, folds, seeds or a search trained, for ``--json``."""
    record(
        trainings=[
            {
                "variant": one.variant.label,
                "seed": one.member.seed,
                "fold": one.member.fold,
                "version": one.version,
                "run_id": one.run.info.run_id if one.run else None,
                "metrics": dict(one.run.data.metrics) if one.run else {},
                "error": one.error or None,
            }
            for one in results
        ]
    )


def report(registry: Registry, trained: Trained) -> None:
    """Say in one line what came out."""
    metric = MAIN_METRIC[KIND[trained.task]]
    value = trained.metrics.get(metric)
    shown = f"test {metric} {value:.3f}" if value is not None else "no test metrics"
    version = f"version {trained.version}" if trained.version else "(not registered)"
    click.echo(f"{trained.name} {version}: {shown} (run {trained.run_id})")
    click.echo(f"MLflow UI: {mlflow_runs.ui_link(registry.client, trained.run_id)}")
    record(
        version=f"{trained.name}/{trained.version}" if trained.version else None,
        run_id=trained.run_id,
        metrics=trained.metrics,
        reused=trained.reused,
    )
