"""Entry point ``ablate``: variants of a recipe as child runs of one parent, with a table and a chart."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import TERMINAL, friendly
from pipelines.steps.options import AS_RECIPE, split_words
from pipelines.use_cases.requests import WORK_DIR


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
    from pipelines.registry.model_versions import Registry
    from pipelines.use_cases.ablate import AblationRequest, ablate_planned, plan_ablation

    plan = plan_ablation(AblationRequest(overrides=shared, engine=None if engine == AS_RECIPE else engine, **options))
    ablate_planned(Registry.connect(), plan, TERMINAL)


if __name__ == "__main__":
    main()
