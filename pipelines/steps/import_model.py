"""Entry point ``import_model``: weights trained elsewhere become a registered version."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.commands import Command, files
from pipelines.steps.options import AS_RECIPE, ENGINES, option, split_words
from pipelines.use_cases.requests import TrainingRequest


@click.command(
    cls=Command,
    headings={
        "What": ("weights", "recipe", "engine", "overrides"),
        "Evaluation": ("data", "device"),
        "MLflow": ("register_as",),
    },
    env="PLANES_IMPORT_MODEL",
    examples=("planes import-model --weights model_final.pth --recipe course_det_final --data path/to/yours",),
    reports=True,
)
@click.option(
    "--weights",
    required=True,
    shell_complete=files,
    help="A .pth, .pkl or .safetensors file of exactly the recipe's network.",
)
@click.option("--recipe", default="course_det_default", show_default=True, help="Recipe that describes the network.")
@option(TrainingRequest, "data", default="data/airfield", help="Data to evaluate on; its test split is used.")
@option(TrainingRequest, "register_as", "--name", default="planes-det")
@option(TrainingRequest, "device")
@option(TrainingRequest, "engine", type=click.Choice([AS_RECIPE, *ENGINES]), default=AS_RECIPE)
@option(TrainingRequest, "overrides", "--set")
@click.argument("opts", nargs=-1, metavar="[KEY VALUE]...")
@friendly
def main(
    *, weights: str, recipe: str, engine: str, overrides: tuple[str, ...], opts: tuple[str, ...], **options: Any
) -> None:
    """Register weights trained elsewhere, such as the model_final.pth of a Detectron2 training.

    Nothing in the file is executed; it leaves as safetensors. KEY VALUE pairs are
    Detectron2's settings, those that the weights were trained with.
    """
    from pipelines.recipes.reading import load_recipe, opts_overrides

    pairs = opts_overrides(split_words(opts))
    changes = (*split_words(overrides), *pairs)
    named = None if engine == AS_RECIPE else engine
    task = load_recipe(recipe, engine=named).task
    from pipelines.registry.model_versions import Registry
    from pipelines.steps.training import report
    from pipelines.use_cases.import_weights import import_planned
    from pipelines.use_cases.training import plan_training

    request = TrainingRequest(
        task=task,
        recipe=recipe,
        data=options["data"],
        register_as=options["register_as"],
        device=options["device"],
        overrides=changes,
        engine=named,
    )
    plan = plan_training(request)
    registry = Registry.connect()
    report(registry, import_planned(registry, weights, plan))


if __name__ == "__main__":
    main()
