"""Variants of a recipe, seeds and folds of them, trained as child runs of one parent, with tables and charts."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.tracking import MlflowClient

from models.errors import ModelError, PlanesError, RecipeError, one_line
from pipelines import ablation
from pipelines.data.dataset import Dataset
from pipelines.evaluation import figures
from pipelines.evaluation.inference import MAIN_METRIC
from pipelines.evaluation.metrics import check_metric
from pipelines.evaluation.spread import Spread
from pipelines.locking import held, lock_of
from pipelines.recipes.reading import load_recipe
from pipelines.recipes.settings import Recipe
from pipelines.registry.model_versions import GROUP, Registry, group_name
from pipelines.tables import text_table
from pipelines.tracking import mlflow_runs
from pipelines.training.loop import Listener, Stopped
from pipelines.use_cases.display import SILENT, Display
from pipelines.use_cases.folds import Folds
from pipelines.use_cases.out_of_fold import log_out_of_fold
from pipelines.use_cases.requests import AblationRequest, TrainingRequest
from pipelines.use_cases.training import KIND, RUN_FILE, Plan, TrainingData, plan_training, run_plan, split_data

log = logging.getLogger(__name__)


def ablate(registry: Registry, request: AblationRequest, display: Display = SILENT) -> list[ablation.Result]:
    """Plan all variants first, then train those that have no finished run; one that fails does not stop the others.

    Raises:
        PlanesError: recipe, variants or data that cannot be used, every variant failed, or an
            equal ablation is going on.
    """
    return ablate_planned(registry, plan_ablation(request, display, registry), display)


@dataclass(frozen=True)
class AblationPlan:
    """An ablation that is ready to start; ``key`` is a digest of its trainings.

    Attributes:
        request: what was asked for.
        trainings: each with the variant and the member that it is of, variant by variant.
        key: a digest of all trainings.
        kind: detector, segmenter or instance_segmenter.
        main_metric: by which variants are ranked.
        everything: the images that are parted into folds, None where there are none.
    """

    request: AblationRequest
    trainings: Sequence[tuple[ablation.Variant, ablation.Member, Plan]]
    key: str
    kind: str
    main_metric: str
    everything: Dataset | None = None

    @property
    def title(self) -> str:
        """What the parent run is called."""
        recipe, request = self.trainings[0][2].recipe.name, self.request
        variants = len({v for v, _, _ in self.trainings})
        counts = [(variants if variants > 1 else 0, "variants"), (request.folds, "folds")]
        counts += [(request.seeds if request.seeds > 1 else 0, "seeds")]
        return f"{'ablate' if variants > 1 else 'train'} {recipe}: {', '.join(f'{n} {what}' for n, what in counts if n)}"


def plan_ablation(request: AblationRequest, display: Display = SILENT, registry: Registry | None = None) -> AblationPlan:
    """Read recipe, variants and data; nothing is written yet.

    Raises:
        PlanesError: recipe, variants or data that cannot be used.
    """
    if request.folds == 1 or request.folds < 0 or request.seeds < 1:
        raise RecipeError("--folds takes 2 or more (0 for none), --seeds 1 or more")
    repeated = request.folds or request.seeds > 1
    alone = repeated and not request.grid and not request.variants
    variants = [ablation.AS_THE_RECIPE] if alone else ablation.make_variants(request.grid, request.variants)
    task = request.task or load_recipe(request.recipe, engine=request.engine).task
    main_metric = MAIN_METRIC[KIND[task]] if request.metric == "auto" else request.metric
    check_metric(main_metric, KIND[task])
    folds = Folds(request.data, request.folds, display.items) if request.folds else None
    trainings = []
    for variant in variants:
        seed = first_seed(request, task, variant) if repeated else 0
        for member in ablation.members(seed, request.seeds, request.folds):
            plan = plan_training(
                training_request(request, task, variant, member), part_of(folds, member), registry=registry
            )
            trainings.append((variant, member, plan))
    if folds:
        _check_same_folds(trainings)
    key = ablation.ablation_key([p.key for _, _, p in trainings])
    if request.register and not request.folds:
        trainings = [(v, m, _in_group(p, key)) for v, m, p in trainings]
    everything = folds.of(trainings[0][2].recipe.data)[0] if folds else None
    return AblationPlan(request, trainings, key, KIND[task], main_metric, everything)


def _check_same_folds(trainings: Sequence[tuple[ablation.Variant, ablation.Member, Plan]]) -> None:
    """Refuse variants that are measured on other folds or other planes: a difference would be that of the data.

    Raises:
        RecipeError: naming the variant.
    """
    held_out: dict[int, str] = {}
    for variant, member, plan in trainings:
        digest = plan.data.test.digest() if plan.data.test else ""
        if held_out.setdefault(member.fold, digest) != digest:
            raise RecipeError(
                f"variant {variant.label}: is measured on other planes or other folds than the first; with --folds, "
                "variants of data.category or data.scene_pattern cannot be held against each other"
            )


def _in_group(plan: Plan, key: str) -> Plan:
    return replace(plan, request=replace(plan.request, tags={**plan.request.tags, GROUP: key}))


def first_seed(request: AblationRequest, task: str, variant: ablation.Variant) -> int:
    """The seed that a variant's recipe names."""
    return load_recipe(request.recipe, (*request.overrides, *variant.overrides), task=task, engine=request.engine).seed


def part_of(folds: Folds | None, member: ablation.Member) -> Callable[[Recipe], TrainingData] | None:
    """What a member is trained and measured on, where that is a fold."""
    if folds is None:
        return None
    return lambda recipe: split_data(*folds.without(recipe.data, member.fold), recipe)


def ablate_planned(registry: Registry, plan: AblationPlan, display: Display = SILENT) -> list[ablation.Result]:
    """Train the variants that have no finished run, one after the other.

    Raises:
        PlanesError: every variant failed, or an equal ablation is going on.
    """
    name = plan.request.name
    with held(lock_of(Path(plan.request.work_dir) / f"{name}-{plan.key}"), f"an equal ablation of {name}"):
        return _ablate(registry, plan, display)


def _ablate(registry: Registry, plan: AblationPlan, display: Display) -> list[ablation.Result]:
    recipe = plan.trainings[0][2].recipe
    with parent_run(
        registry, plan.request, title=plan.title, key=plan.key, recipe=recipe, main_metric=plan.main_metric
    ) as parent:
        results: list[ablation.Result] = []
        repeated = len(plan.trainings) > len({v for v, _, _ in plan.trainings})
        for training in plan.trainings:
            number = f"{'training' if repeated else 'variant'} {len(results) + 1}/{len(plan.trainings)}"
            results.append(train_one(registry, training, parent=parent, title=number, display=display))
            log_results(registry.client, results, plan.main_metric)
        if all(r.run is None for r in results):
            raise ModelError(f"every variant failed; the first: {results[0].error}")
        show_results(results, plan.main_metric)
        if plan.everything is not None:
            _log_folds(plan, plan.everything, results)
        _say_what_next(plan, results, parent)
        failed = [r for r in results if r.run is None]
        if failed and ablation.by_variant(results).keys() == {ablation.AS_THE_RECIPE}:
            raise ModelError(
                f"{len(failed)} of {len(results)} trainings failed (first: {failed[0].error}); "
                "the same command does what is missing"
            )
    return results


def _say_what_next(plan: AblationPlan, results: Sequence[ablation.Result], parent: str) -> None:
    """The names that the next commands want: of a group of versions, or of the run that knows what scores mean."""
    name, versions = plan.request.name, [r.version for r in results if r.version]
    if len(versions) > 1:
        log.info(f"as a group: {name}/{group_name(versions)}")
    if plan.everything is not None and plan.kind != "segmenter" and len(ablation.by_variant(results)) == 1:
        log.info(f"a version that is trained without --folds knows what its scores mean by --scores-from {parent}")


@contextmanager
def parent_run(
    registry: Registry, request: AblationRequest, *, title: str, key: str, recipe: Recipe, main_metric: str
) -> Iterator[str]:
    """The run that the trainings of an ablation are children of: that of an equal one that was stopped, else a new one."""
    # Under `mlflow run` the given run is the parent, not a variant's.
    given = os.environ.get("MLFLOW_RUN_ID")
    earlier = None if request.fresh else ablation.find_parent(registry.client, key, given)
    tags = {"task": "ablate", "recipe": recipe.name, ablation.KEY: key}
    with mlflow_runs.tracked_run(registry.client, title, tags, resume_id=earlier.info.run_id if earlier else None) as run:
        parent = _parent_of_children(registry.client, run.info.run_id, earlier)
        os.environ.pop("MLFLOW_RUN_ID", None)
        texts = {k: " ".join(getattr(request, k)) for k in ("grid", "variants", "overrides")}
        mlflow_runs.log_params({**request.__dict__, **texts, "engine": recipe.engine, "metric": main_metric})
        yield parent
        log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, run.info.run_id)}")


def training_request(
    request: AblationRequest, task: str, variant: ablation.Variant, member: ablation.Member
) -> TrainingRequest:
    """The request of one training of an ablation."""
    repeated = request.folds or request.seeds > 1
    tags = {"seed": str(member.seed)} if repeated else {}
    tags |= {"fold": f"{member.fold}/{member.folds}"} if member.folds else {}
    seed = (f"seed={member.seed}",) if repeated else ()
    return TrainingRequest(
        task=task,
        recipe=request.recipe,
        data=request.data,
        register_as=request.name,
        device=request.device,
        overrides=(*request.overrides, *variant.overrides, *seed),
        engine=request.engine,
        work_dir=request.work_dir,
        fresh=request.fresh,
        num_gpus=request.num_gpus,
        scores_from=request.scores_from,
        register=request.register and not request.folds,
        label=" ".join(text for text in (variant.label, member.label if repeated else "") if text),
        tags=tags,
    )


def _parent_of_children(client: MlflowClient, run_id: str, earlier: Any) -> str:
    """The run under which the variants' runs are: an unfinished earlier ablation's are taken over."""
    if earlier is None or earlier.info.run_id == run_id:
        return run_id
    if earlier.info.status == "FINISHED":
        mlflow.set_tag(ablation.SAME, earlier.info.run_id)
        return str(earlier.info.run_id)
    count = ablation.adopt_children(client, earlier, run_id)
    log.info(f"going on with an ablation that was stopped; {count} runs taken over")
    return run_id


def train_one(
    registry: Registry,
    training: tuple[ablation.Variant, ablation.Member, Plan],
    *,
    parent: str,
    title: str,
    display: Display,
    listeners: Sequence[Listener] = (),
) -> ablation.Result:
    """Train one child, or take its finished run; an error is a result.

    Raises:
        Stopped: a listener had the training end early.
    """
    variant, member, one = training
    title = f"{title} {one.request.label}"
    done = ablation.finished_child(registry.client, parent, one.key)
    if done is not None:
        log.info(f"== {title}: done already (run {done.info.run_id})")
        return ablation.Result(variant, done, "", member, _version(registry, one, done.info.run_id))
    log.info(f"== {title}")
    noted = one.folder / RUN_FILE
    current = json.loads(noted.read_text())["run_id"] if noted.exists() else None
    ablation.end_lost_children(registry.client, parent, one.key, current)
    os.environ["PLANES_PARENT_RUN_ID"] = parent
    try:
        trained = run_plan(registry, one, display, listeners)
    except Stopped:
        raise
    except PlanesError as error:
        log.warning(f"{title} failed: {one_line(error)}")
        return ablation.Result(variant, None, one_line(error), member)
    finally:
        os.environ.pop("PLANES_PARENT_RUN_ID", None)
    return ablation.Result(variant, registry.client.get_run(trained.run_id), "", member, trained.version)


def _version(registry: Registry, plan: Plan, run_id: str) -> str | None:
    if not plan.request.register:
        return None
    known = registry.search_versions(f"run_id = '{run_id}'")
    return next((str(v.version) for v in known if v.name == plan.request.register_as), None)


def log_results(client: MlflowClient, results: list[ablation.Result], main_metric: str) -> None:
    """Tables and charts of what is there so far, on the parent."""
    metric = ablation.deciding_metric(results, main_metric)
    groups = ablation.by_variant(results)
    rows = ablation.result_rows(results, metric)
    mlflow.log_text(ablation.as_csv(rows), "ablation.csv")
    if any(len(group) > 1 for group in groups.values()):
        mlflow.log_text(ablation.as_csv(ablation.training_rows(results)), "trainings.csv")
    if list(groups) == [ablation.AS_THE_RECIPE]:
        _log_spread(results)
        return
    bars = [(variant.label, row[metric]) for variant, row in zip(groups, rows, strict=True)]
    spreads = [row.get(f"{metric}_sd", math.nan) for row in rows]
    firsts = {variant.label: group[0] for variant, group in groups.items()}
    losses = {label: ablation.curves(client, first, "train/loss") for label, first in firsts.items()}
    validation = {label: ablation.curves(client, first, f"val/{main_metric}") for label, first in firsts.items()}
    mlflow.log_figure(
        figures.ablation_figure(bars, metric, losses, validation, f"val/{main_metric}", spreads=spreads),
        "figures/ablation.png",
    )
    best = ablation.best_variant(results, metric)
    if best is not None:
        mlflow.log_metric(f"best/{metric}", dict(bars)[best.label])
        mlflow.set_tag("best_variant", best.label)


def _log_spread(results: list[ablation.Result]) -> None:
    """Mean and standard deviation of every metric over the trainings of one recipe, and their chart."""
    names = sorted({k for r in results if r.run for k in r.run.data.metrics if k.startswith(("test/", "val/best_"))})
    values = {name: list(ablation.values_of(results, name).values()) for name in names}
    for name, numbers in values.items():
        spread = Spread.of(numbers)
        mlflow.log_metric(f"mean/{name}", spread.mean)
        if spread.count > 1:
            mlflow.log_metric(f"sd/{name}", spread.sd)
    shown = {k: v for k in ablation.SHOWN if (v := values.get(f"test/{k}") or values.get(f"val/best_{k}"))}
    if shown:
        mlflow.log_figure(
            figures.seeds_figure(shown, f"{len(results)} trainings: mean, deviation, each"), "figures/spread.png"
        )


def _log_folds(plan: AblationPlan, everything: Dataset, results: list[ablation.Result]) -> None:
    """What all folds together say, on the parent and in a table."""
    groups, rows = ablation.by_variant(results), []
    for number, (variant, group) in enumerate(groups.items(), start=1):
        prefix = f"variant-{number}/" if len(groups) > 1 else ""
        if all(r.run is None for r in group):
            continue
        by_seed = log_out_of_fold(group, everything, plan.kind, prefix)
        if not by_seed:
            log.warning(f"{variant.label or 'the recipe'}: a fold is missing; no metrics of all folds together")
            continue
        spreads = {k: Spread.of([v.get(k, math.nan) for v in by_seed.values()]) for k in next(iter(by_seed.values()))}
        shown = [k for k in ablation.SHOWN if k in spreads]
        rows.append(
            {"variant": variant.label, **{k: str(spreads[k]) for k in shown}}
            if variant.label
            else {k: str(spreads[k]) for k in shown}
        )
    if rows:
        spread = ", mean ± standard deviation over seeds" if plan.request.seeds > 1 else ""
        log.info(f"all folds together, as one test set{spread}:\n{text_table(rows, 'keys')}")


def show_results(results: list[ablation.Result], main_metric: str) -> None:
    """The table of variants, in words."""
    metric = ablation.deciding_metric(results, main_metric)
    groups = ablation.by_variant(results)
    if any(len(group) > 1 for group in groups.values()):
        rows = []
        for row, group in zip(ablation.result_rows(results, metric), groups.values(), strict=True):
            names = [metric, *(f"test/{k}" for k in ablation.SHOWN)]
            cells = {
                k: str(Spread.of(list(ablation.values_of(group, k).values()))) for k in dict.fromkeys(names) if k in row
            }
            versions = ", ".join(r.version for r in group if r.version)
            more = {"against the best": row["against the best"]} if "against the best" in row else {}
            more |= {"versions": versions} if versions else {}
            more |= {"error": row["error"]} if row["error"] else {}
            rows.append({"variant": row["variant"] or "the recipe", **cells, **more})
        columns = list(dict.fromkeys(k for row in rows for k in row))
        log.info(text_table([[row.get(k, "") for k in columns] for row in rows], columns))
        return
    table = pd.DataFrame(ablation.result_rows(results, metric)).drop(columns="variant")
    if not table["error"].any():
        table = table.drop(columns="error")
    log.info(table.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))
