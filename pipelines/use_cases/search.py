"""A search over settings of a recipe: Optuna proposes, each trial is a child run, poor ones are stopped early."""

from __future__ import annotations

import importlib
import json
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow

from models.errors import EngineMissing, ModelError, RecipeError
from pipelines import ablation
from pipelines.evaluation.inference import MAIN_METRIC
from pipelines.evaluation.metrics import check_metric
from pipelines.evaluation.spread import Spread
from pipelines.locking import held, lock_of
from pipelines.recipes.reading import load_recipe
from pipelines.registry.model_versions import Registry
from pipelines.training.loop import Stopped
from pipelines.use_cases.ablate import (
    first_seed,
    log_results,
    parent_run,
    part_of,
    show_results,
    train_one,
    training_request,
)
from pipelines.use_cases.display import SILENT, Display
from pipelines.use_cases.folds import Folds
from pipelines.use_cases.requests import AblationRequest
from pipelines.use_cases.training import KIND, RUN_FILE, Plan, plan_training

log = logging.getLogger(__name__)

# Tag of a run that was stopped early: the step.
PRUNED = "pruned_at"
# Trials that run to their end before any is held against them.
FIRST = 4
# A range of positive numbers that spans as much is searched on a logarithmic scale.
WIDE = 10


@dataclass(frozen=True)
class Dimension:
    """One searched setting: its choices, or the least and largest of its values.

    >>> Dimension.parse("lr=0.0001..0.01"), Dimension.parse("batch_size=2..8").whole
    (Dimension(key='lr', choices=(), low=0.0001, high=0.01, whole=False, log=True), True)
    >>> Dimension.parse("optimizer.schedule=cosine,constant").choices
    ('cosine', 'constant')
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = math.nan
    high: float = math.nan
    whole: bool = False
    log: bool = False

    @classmethod
    def parse(cls, entry: str) -> Dimension:
        """From ``key=low..high`` or ``key=v1,v2``.

        Raises:
            RecipeError: neither.
        """
        key, sign, text = entry.partition("=")
        low, dots, high = text.partition("..")
        if not dots:
            return cls(key, tuple(choice.partition("=")[2] for choice in ablation.axis(entry)))
        try:
            bounds = float(low), float(high)
        except ValueError:
            bounds = math.nan, math.nan
        if not (sign and key and bounds[0] < bounds[1]):
            raise RecipeError(f"--grid {entry!r}: expected key=low..high, numbers with low below high, or key=value,value")
        whole = all(text.lstrip("-").isdigit() for text in (low, high))
        return cls(key, (), *bounds, whole=whole, log=bounds[0] > 0 and bounds[1] >= WIDE * bounds[0])

    def suggest(self, trial: Any) -> str:
        """The override that a trial is to try."""
        if self.choices:
            return f"{self.key}={trial.suggest_categorical(self.key, self.choices)}"
        if self.whole:
            return f"{self.key}={trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)}"
        value = trial.suggest_float(self.key, self.low, self.high, log=self.log)
        # Four digits tell settings apart, and read well.
        return f"{self.key}={value:.4g}"


@dataclass(frozen=True)
class SearchPlan:
    """A search that is ready to start; ``key`` is a digest of what is searched, not of how long."""

    request: AblationRequest
    task: str
    space: list[Dimension]
    first: Plan
    key: str
    metric: str
    folds: Folds | None = field(compare=False, default=None)


def search(registry: Registry, request: AblationRequest, display: Display = SILENT) -> list[ablation.Result]:
    """Plan and run the trials that are missing.

    Raises:
        PlanesError: see `plan_search` and `search_planned`.
    """
    return search_planned(registry, plan_search(request, display, registry), display)


def plan_search(request: AblationRequest, display: Display = SILENT, registry: Registry | None = None) -> SearchPlan:
    """Read recipe, space and data; nothing is written yet.

    Raises:
        PlanesError: recipe, space or data that cannot be used; nothing to judge trials by but the test set.
        EngineMissing: Optuna is not installed.
    """
    study = _study()
    space = [Dimension.parse(entry) for text in request.grid for entry in shlex.split(text)]
    if not space or request.variants:
        raise RecipeError('--search goes through --grid, such as --grid "lr=0.0001..0.003 batch_size=2,4,8"')
    if request.folds == 1 or request.seeds < 1:
        raise RecipeError("--folds takes 2 or more (0 for none), --seeds 1 or more")
    task = request.task or load_recipe(request.recipe, engine=request.engine).task
    metric = MAIN_METRIC[KIND[task]] if request.metric == "auto" else request.metric
    check_metric(metric, KIND[task])
    folds = Folds(request.data, request.folds, display.items) if request.folds else None
    variant = _proposed(study.ask(), space)
    member = ablation.members(first_seed(request, task, variant), 1, request.folds)[0]
    asked = training_request(request, task, variant, member)
    first = plan_training(asked, part_of(folds, member), registry=registry)
    if folds is None and first.data.val is None:
        raise RecipeError(
            "--search needs something to judge trials by that is not the test set: data.val_fraction above 0, or --folds"
        )
    what = [request.recipe, request.engine, *request.overrides, *map(str, space), request.folds, request.seeds, metric]
    key = ablation.ablation_key([json.dumps(what), first.key])
    return SearchPlan(request, task, space, first, key, metric, folds)


def search_planned(registry: Registry, plan: SearchPlan, display: Display = SILENT) -> list[ablation.Result]:
    """Run the trials that are missing; those of an earlier call are not run again, whatever their number was then.

    Raises:
        PlanesError: every trial failed, or an equal search is going on.
    """
    name, request = plan.request.name, plan.request
    title = f"search {plan.first.recipe.name}: {request.search} trials"
    with (
        held(lock_of(Path(request.work_dir) / f"{name}-{plan.key}"), f"an equal search of {name}"),
        parent_run(
            registry, request, title=title, key=plan.key, recipe=plan.first.recipe, main_metric=plan.metric
        ) as parent,
    ):
        results = _search(registry, plan, parent, display)
        mlflow.log_metric("trials", len(ablation.by_variant(results)))
    return results


def _search(registry: Registry, plan: SearchPlan, parent: str, display: Display) -> list[ablation.Result]:
    optuna, study = _optuna(), _study()
    results: list[ablation.Result] = []
    known: dict[ablation.Variant, list[ablation.Result]] = {}
    for number in range(plan.request.search):
        # Asked in the same order with the same seed, what was told before is proposed again.
        trial = study.ask()
        variant = _proposed(trial, plan.space)
        title = f"trial {number + 1}/{plan.request.search}"
        if variant in known:
            # Of choices alone it may come again.
            mine = known[variant]
        else:
            mine = known[variant] = _train_members(
                registry, plan, variant, trial, parent=parent, title=title, display=display
            )
            results += mine
        value = _value(mine, plan)
        stopped = any(r.run is not None and PRUNED in r.run.data.tags for r in mine)
        if stopped or math.isnan(value):
            state = optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.FAIL
            study.tell(trial, state=state)
        else:
            study.tell(trial, value)
        log_results(registry.client, results, plan.metric)
    if all(r.run is None for r in results):
        raise ModelError(f"every trial failed; the first: {results[0].error}")
    show_results(results, plan.metric)
    return results


def _train_members(
    registry: Registry,
    plan: SearchPlan,
    variant: ablation.Variant,
    trial: Any,
    *,
    parent: str,
    title: str,
    display: Display,
) -> list[ablation.Result]:
    request, results = plan.request, []
    repeated = request.folds or request.seeds > 1
    seed = first_seed(request, plan.task, variant) if repeated else 0
    members = ablation.members(seed, request.seeds, request.folds)
    for member in members:
        asked = training_request(request, plan.task, variant, member)
        one = plan_training(asked, part_of(plan.folds, member), registry=registry)
        judge = _Judge(trial, f"val/{plan.metric}")
        training = (variant, member, one)
        listeners = [judge] if len(members) == 1 else []
        try:
            result = train_one(registry, training, parent=parent, title=title, display=display, listeners=listeners)
        except Stopped:
            results.append(_stopped(registry, training, judge.step))
            continue
        if result.run is not None and listeners:
            # One of an earlier call tells the same again.
            judge.replay(registry, result.run.info.run_id)
        results.append(result)
    return results


def _stopped(registry: Registry, training: tuple[ablation.Variant, ablation.Member, Plan], step: int) -> ablation.Result:
    """The result of a trial that was stopped early: its run is finished, and says so."""
    variant, member, one = training
    run_id = json.loads((one.folder / RUN_FILE).read_text())["run_id"]
    registry.client.set_tag(run_id, PRUNED, str(step))
    registry.client.set_terminated(run_id, "FINISHED")
    log.info(f"{variant.label}: stopped at step {step}, behind half of the others")
    return ablation.Result(variant, registry.client.get_run(run_id), f"stopped at step {step}", member)


def _value(results: Sequence[ablation.Result], plan: SearchPlan) -> float:
    """What a trial is judged by: the mean over its trainings of the best validation, or of the folds held back."""
    name = f"test/{plan.metric}" if plan.folds else f"val/best_{plan.metric}"
    if any(r.run is None for r in results):
        return math.nan
    return Spread.of(list(ablation.values_of(results, name).values())).mean


class _Judge:
    """A listener that tells Optuna each validation, and ends a training that it finds wanting."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial, self.metric, self.step = trial, metric, 0

    def on_start(self, history: Sequence[dict[str, Any]], total: int) -> None:
        """Tell what an earlier process saw."""
        for record in history:
            self._tell(record)

    def on_step(self, record: dict[str, Any]) -> None:
        """Tell a validation; end the training where it is behind.

        Raises:
            Stopped: it is.
        """
        if self._tell(record) and self.trial.should_prune():
            raise Stopped(f"stopped at step {self.step}")

    def on_checkpoint(self, history: Sequence[dict[str, Any]]) -> None:
        """Nothing."""

    def replay(self, registry: Registry, run_id: str) -> None:
        """Tell the validations of a run that was finished before."""
        for point in sorted(registry.client.get_metric_history(run_id, self.metric), key=lambda p: p.step):
            self._tell({"step": point.step, self.metric: point.value})

    def _tell(self, record: dict[str, Any]) -> bool:
        value = record.get(self.metric, math.nan)
        if not math.isfinite(value) or record["step"] <= self.step:
            return False
        self.step = int(record["step"])
        self.trial.report(float(value), self.step)
        return True


def _proposed(trial: Any, space: Sequence[Dimension]) -> ablation.Variant:
    return ablation.Variant(tuple(dimension.suggest(trial) for dimension in space))


def _study() -> Any:
    """A study whose proposals depend on nothing but what it is told: TPE, and the median of the others at each step."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=FIRST)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=FIRST)
    return optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise EngineMissing("--search needs Optuna: pip install optuna") from error
