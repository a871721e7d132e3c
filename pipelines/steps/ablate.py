"""Entry point ``ablate``: variants of a recipe as child runs of one parent, with a table and a chart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.options import AS_RECIPE, WORK_DIR, TrainingRequest, split_words


@dataclass(frozen=True)
class AblationRequest:
    """What the command was asked for."""

    recipe: str
    data: str
    name: str
    device: str
    grid: tuple[str, ...]
    variants: tuple[str, ...]
    overrides: tuple[str, ...]
    metric: str
    engine: str | None
    work_dir: str
    fresh: bool


@click.command()
@click.option("--recipe", default="demo_detector", show_default=True, help="Recipe name or path of a YAML file.")
@click.option("--data", default="data/airfield", show_default=True, help="Data folder, COCO JSON or course JSON.")
@click.option("--name", default="planes-ablation", show_default=True, help="Name of the models logged (not registered).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--grid", multiple=True, help='"key=v1,v2": all combinations of all entries; repeatable.')
@click.option("--variants", multiple=True, help='"key=v key=v; key=v": variants one by one, instead of a grid.')
@click.option("--set", "overrides", multiple=True, help="section.key=value for all variants; repeatable.")
@click.option("--metric", default="auto", show_default=True, help="AP, AP50, mask_AP, IoU, ...; auto: the task's main one.")
@click.option("--engine", default=AS_RECIPE, type=click.Choice([AS_RECIPE, "torchvision", "detectron2"]), show_default=True)
@click.option("--work-dir", default=WORK_DIR, show_default=True, help="Where checkpoints are kept.")
@click.option("--fresh", is_flag=True, help="Do again what an equal ablation has done.")
@click.argument("opts", nargs=-1, metavar="[KEY VALUE]...")
@friendly
def main(opts: tuple[str, ...], engine: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Train variants of a recipe and compare them; what is done is not done again.

    \b
    ablate --recipe demo_detector --grid "lr=0.0005,0.001"
    ablate --recipe course_det_final --grid "SOLVER.MAX_ITER=1000,5000 SOLVER.BASE_LR=0.00025,0.0005,0.001"
    """
    from pipelines.recipes.reading import opts_overrides

    pairs = opts_overrides(split_words(opts))
    shared = (*split_words(overrides), *pairs)
    ablate(AblationRequest(overrides=shared, engine=None if engine == AS_RECIPE else engine, **options))


def ablate(request: AblationRequest) -> None:
    """Plan all variants first, then train those that have no finished run; one that fails does not stop the others.

    Raises:
        PlanesError: recipe, variants or data that cannot be used, every variant failed, or an
            equal ablation is going on.
    """

    from pipelines import ablation
    from pipelines.evaluation.inference import MAIN_METRIC
    from pipelines.locking import held, lock_of
    from pipelines.recipes.reading import load_recipe
    from pipelines.steps.training import KIND, plan_training
    from pipelines.tracking import mlflow_runs

    variants = ablation.make_variants(request.grid, request.variants)
    task = load_recipe(request.recipe, engine=request.engine).task
    main_metric = MAIN_METRIC[KIND[task]] if request.metric == "auto" else request.metric
    plans = [plan_training(_request(request, task, v)) for v in variants]
    key = ablation.ablation_key([p.key for p in plans])
    mlflow_runs.connect()
    with held(lock_of(Path(request.work_dir) / f"{request.name}-{key}"), f"an equal ablation of {request.name}"):
        _ablate(request, variants, plans, key, main_metric)


def _ablate(request: AblationRequest, variants: Sequence[Any], plans: Sequence[Any], key: str, main_metric: str) -> None:
    import mlflow

    from models.errors import ModelError
    from pipelines import ablation
    from pipelines.tracking import mlflow_runs

    # Under `mlflow run` the given run is the parent, not a variant's.
    given = os.environ.get("MLFLOW_RUN_ID")
    earlier = None if request.fresh else ablation.find_parent(key, given)
    tags = {"task": "ablate", "recipe": plans[0].recipe.name, ablation.KEY: key}
    title = f"ablate {plans[0].recipe.name}: {len(variants)} variants"
    with mlflow_runs.tracked_run(title, tags, earlier.info.run_id if earlier else None) as run:
        parent = _parent_of_children(run.info.run_id, earlier)
        os.environ.pop("MLFLOW_RUN_ID", None)
        texts = {k: " ".join(getattr(request, k)) for k in ("grid", "variants", "overrides")}
        mlflow_runs.log_params({**request.__dict__, **texts, "engine": plans[0].recipe.engine, "metric": main_metric})
        results: list[ablation.Result] = []
        for variant, plan in zip(variants, plans, strict=True):
            results.append(_one(variant, plan, parent, len(results) + 1, len(variants)))
            _log(results, main_metric)
        if all(r.run is None for r in results):
            raise ModelError(f"every variant failed; the first: {results[0].error}")
        _show(results, main_metric)
        click.echo(f"MLflow UI: {mlflow_runs.ui_link(mlflow.get_tracking_uri(), run.info.run_id)}")


def _request(request: AblationRequest, task: str, variant: Any) -> TrainingRequest:
    return TrainingRequest(
        task,
        request.recipe,
        request.data,
        request.name,
        request.device,
        (*request.overrides, *variant.overrides),
        request.engine,
        request.work_dir,
        register=False,
        label=variant.label,
    )


def _parent_of_children(run_id: str, earlier: Any) -> str:
    """The run under which the variants' runs are: an unfinished earlier ablation's are taken over."""
    import mlflow

    from pipelines import ablation

    if earlier is None or earlier.info.run_id == run_id:
        return run_id
    if earlier.info.status == "FINISHED":
        mlflow.set_tag("same_as", earlier.info.run_id)
        return str(earlier.info.run_id)
    count = ablation.adopt_children(earlier, run_id)
    click.echo(f"going on with an ablation that was stopped; {count} runs taken over")
    return run_id


def _one(variant: Any, plan: Any, parent: str, number: int, total: int) -> Any:
    from mlflow.tracking import MlflowClient

    from models.errors import PlanesError, one_line
    from pipelines import ablation
    from pipelines.steps.training import run_plan

    title = f"variant {number}/{total} {variant.label}"
    done = ablation.finished_child(parent, plan.key)
    if done is not None:
        click.echo(f"== {title}: done already (run {done.info.run_id})")
        return ablation.Result(variant, done)
    click.echo(f"== {title}")
    os.environ["PLANES_PARENT_RUN_ID"] = parent
    try:
        trained = run_plan(plan)
    except PlanesError as error:
        click.echo(f"{title} failed: {one_line(error)}", err=True)
        return ablation.Result(variant, None, one_line(error))
    finally:
        os.environ.pop("PLANES_PARENT_RUN_ID", None)
    return ablation.Result(variant, MlflowClient().get_run(trained.run_id))


def _log(results: list[Any], main_metric: str) -> None:
    """Table and chart of what is there so far, on the parent."""
    import mlflow

    from pipelines import ablation
    from pipelines.evaluation import figures

    metric = ablation.deciding_metric(results, main_metric)
    rows = ablation.result_rows(results, metric)
    mlflow.log_text(ablation.as_csv(rows), "ablation.csv")
    bars = [(r.variant.label, row[metric]) for r, row in zip(results, rows, strict=True)]
    losses = {r.variant.label: ablation.curves(r, "train/loss") for r in results}
    validation = {r.variant.label: ablation.curves(r, f"val/{main_metric}") for r in results}
    mlflow.log_figure(
        figures.ablation_figure(bars, metric, losses, validation, f"val/{main_metric}"), "figures/ablation.png"
    )
    known = [(value, label) for label, value in bars if value == value]
    if known:
        best, label = max(known)
        mlflow.log_metric(f"best/{metric}", best)
        mlflow.set_tag("best_variant", label)


def _show(results: list[Any], main_metric: str) -> None:
    import pandas as pd

    from pipelines import ablation

    metric = ablation.deciding_metric(results, main_metric)
    table = pd.DataFrame(ablation.result_rows(results, metric)).drop(columns="variant")
    if not table["error"].any():
        table = table.drop(columns="error")
    click.echo(table.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))


if __name__ == "__main__":
    main()
