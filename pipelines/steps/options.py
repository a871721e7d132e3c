"""Command line options of the training entry points, and the request that they make."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import click

from pipelines.use_cases.requests import WORK_DIR, TrainingRequest

AS_RECIPE = "recipe"


def training_options(
    recipe: str, name: str, engines: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """click options of a training entry point with its default recipe, registered name and engines, if several."""
    options = [
        click.option("--recipe", default=recipe, show_default=True, help="Recipe name or path of a YAML file."),
        click.option("--data", default="data/airfield", show_default=True, help="Data folder, COCO JSON or course JSON."),
        click.option("--name", default=name, show_default=True, help="Registered model to add a version to."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--steps", default=AS_RECIPE, show_default=True, help="Training steps."),
        click.option("--epochs", default=AS_RECIPE, show_default=True, help="Epochs, instead of steps."),
        click.option("--batch-size", default=AS_RECIPE, show_default=True, help="Examples per step."),
        click.option("--lr", default=AS_RECIPE, show_default=True, help="Learning rate."),
        click.option("--seed", default=AS_RECIPE, show_default=True, help="Seed of weights, data order and augmentation."),
        click.option("--weights", default=AS_RECIPE, show_default=True, help="none, a library's weight name, or a path."),
        click.option("--set", "overrides", multiple=True, help="section.key=value of the recipe; repeatable."),
        click.option("--work-dir", default=WORK_DIR, show_default=True, help="Where checkpoints are kept."),
        click.option("--reuse/--no-reuse", default=False, help="Take the version of an equal training, if there is one."),
        click.option("--fresh", is_flag=True, help="Throw away an unfinished equal training instead of going on."),
    ]
    if engines:
        options += [
            click.option(
                "--engine",
                default=AS_RECIPE,
                show_default=True,
                type=click.Choice([AS_RECIPE, *engines]),
                help="Detection library; takes the recipe's twin NAME_ENGINE where the recipe is for another.",
            ),
            click.option(
                "--num-gpus",
                default=1,
                show_default=True,
                type=click.IntRange(1),
                help="Processes that Detectron2 starts.",
            ),
            click.argument("opts", nargs=-1, metavar="[KEY VALUE]..."),
        ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def request_from(task: str, options: dict[str, Any]) -> TrainingRequest:
    """Collect command line options; named ones become overrides of the recipe.

    Raises:
        RecipeError: Detectron2 settings that are no pairs.
    """
    from pipelines.recipes.reading import SHORT, opts_overrides

    named = [f"{key}={options[key]}" for key in (*SHORT, "weights") if str(options[key]) != AS_RECIPE]
    engine = options.get("engine", AS_RECIPE)
    return TrainingRequest(
        task=task,
        recipe=options["recipe"],
        data=options["data"],
        register_as=options["name"],
        device=options["device"],
        overrides=(*split_words(options["overrides"]), *named, *opts_overrides(split_words(options.get("opts", ())))),
        engine=None if engine == AS_RECIPE else engine,
        work_dir=options["work_dir"],
        reuse=options["reuse"],
        fresh=options["fresh"],
        num_gpus=options.get("num_gpus", 1),
    )


def split_words(values: Sequence[str]) -> list[str]:
    """Values of ``--set`` or trailing ``KEY VALUE``, each of which may hold several separated by spaces."""
    return [part for value in values for part in shlex.split(value)]
