"""Entry point ``ablate``: variants of a recipe as child runs of one parent, with a table and a chart."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import TERMINAL, friendly
from pipelines.steps.commands import Command
from pipelines.steps.options import AS_RECIPE, ENGINES, option, split_words
from pipelines.use_cases.requests import AblationRequest


@click.command(
    cls=Command,
    headings={
        "What to train": ("recipe", "data", "engine", "overrides"),
        "Variants": ("grid", "variants", "search", "metric"),
        "Folds, seeds": ("folds", "seeds"),
        "Device": ("device", "num_gpus"),
        "MLflow": ("name",),
        "Going on": ("work_dir", "fresh"),
    },
    env="PLANES_ABLATE",
    examples=(
        'planes ablate --recipe demo_detector --grid "lr=0.0005,0.001"',
        'planes ablate --recipe demo_detector --grid "lr=0.0001..0.003 batch_size=2,4,8" --search 20',
        "planes ablate --recipe course_det_final \\",
        '    --grid "SOLVER.MAX_ITER=1000,5000 SOLVER.BASE_LR=0.00025,0.0005,0.001"',
    ),
    reports=True,
)
@option(AblationRequest, "recipe", default="demo_detector")
@option(AblationRequest, "data", default="data/airfield")
@option(AblationRequest, "name", default="planes-ablation")
@option(AblationRequest, "device")
@option(AblationRequest, "grid")
@option(AblationRequest, "variants")
@option(AblationRequest, "overrides", "--set")
@option(AblationRequest, "metric")
@option(AblationRequest, "engine", type=click.Choice([AS_RECIPE, *ENGINES]), default=AS_RECIPE)
@option(AblationRequest, "folds", type=click.IntRange(0))
@option(AblationRequest, "seeds", type=click.IntRange(1))
@option(AblationRequest, "search", type=click.IntRange(0))
@option(AblationRequest, "work_dir")
@option(AblationRequest, "fresh")
@option(AblationRequest, "num_gpus", type=click.IntRange(1))
@click.argument("opts", nargs=-1, metavar="[KEY VALUE]...")
@friendly
def main(opts: tuple[str, ...], engine: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Train variants of a recipe and compare them; what is done is not done again."""
    from pipelines.recipes.reading import opts_overrides

    pairs = opts_overrides(split_words(opts))
    shared = (*split_words(overrides), *pairs)
    from pipelines.registry.model_versions import Registry
    from pipelines.steps.training import record_trainings
    from pipelines.use_cases.ablate import ablate_planned, plan_ablation

    request = AblationRequest(overrides=shared, engine=None if engine == AS_RECIPE else engine, **options)
    if request.search:
        from pipelines.use_cases.search import plan_search, search_planned

        searched = plan_search(request, TERMINAL)
        record_trainings(search_planned(Registry.connect(), searched, TERMINAL))
        return
    plan = plan_ablation(request, TERMINAL)
    record_trainings(ablate_planned(Registry.connect(), plan, TERMINAL))


if __name__ == "__main__":
    main()
