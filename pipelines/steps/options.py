"""Command line options made from the fields of requests, those of the training entry points, and their request."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from pipelines.steps.commands import files
from pipelines.use_cases.requests import AblationRequest, TrainingRequest

AS_RECIPE = "recipe"
ENGINES = ("torchvision", "detectron2")

HEADINGS = {
    "What to train": ("recipe", "data", "weights", "engine", "overrides"),
    "How long, and how": ("steps", "epochs", "batch_size", "lr", "seed"),
    "Folds, seeds, scores": ("folds", "seeds", "scores_from"),
    "Device": ("device", "num_gpus"),
    "MLflow": ("register_as", "reuse"),
    "Going on": ("work_dir", "fresh"),
}
# Fields of requests that name a file or folder, or may.
PATHS = ("data", "out", "gates", "calibration", "recipe", "work_dir")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(request: type, name: str, *names: str, **more: Any) -> Decorator:
    """The click option of a request's field: its help, its default, its choices.

    Args:
        request: dataclass whose fields have a ``help``.
        name: of the field.
        names: of the option, without them ``--name``; the command gets it as ``name`` or as the one without dashes.
        more: for `click.option`, instead of what the field says.
    """
    field = {f.name: f for f in dataclasses.fields(request)}[name]
    kind = get_type_hints(request)[name]
    settings: dict[str, Any] = {"help": field.metadata["help"]}
    if field.default is not dataclasses.MISSING and "default" not in more:
        settings["default"] = field.default
    if get_origin(kind) is Literal:
        settings["type"] = click.Choice(get_args(kind))
    elif get_origin(kind) is tuple:
        settings |= {"multiple": True}
    elif kind is bool and not any("/" in text for text in names):
        settings["is_flag"] = True
    if name in PATHS:
        settings["shell_complete"] = files
    settings |= more
    shown = settings.get("default")
    settings.setdefault("show_default", not isinstance(shown, bool | tuple) and shown not in (None, ""))
    names = names or (f"--{name.replace('_', '-')}",)
    if all(text.startswith("-") for text in names):
        names = (*names, name)
    return click.option(*names, **settings)


def training_options(recipe: str, name: str, engines: Sequence[str] = ()) -> Decorator:
    """click options of a training entry point with its default recipe, registered name and engines, if several."""
    options = [
        option(TrainingRequest, "recipe", default=recipe),
        option(TrainingRequest, "data", default="data/airfield"),
        option(TrainingRequest, "register_as", "--name", default=name),
        option(TrainingRequest, "device"),
        click.option("--steps", default=AS_RECIPE, show_default=True, help="Training steps."),
        click.option("--epochs", default=AS_RECIPE, show_default=True, help="Epochs, instead of steps."),
        click.option("--batch-size", default=AS_RECIPE, show_default=True, help="Examples per step."),
        click.option("--lr", default=AS_RECIPE, show_default=True, help="Learning rate."),
        click.option("--seed", default=AS_RECIPE, show_default=True, help="Seed of weights, data order and augmentation."),
        click.option(
            "--weights",
            default=AS_RECIPE,
            show_default=True,
            shell_complete=files,
            help="none, a library's weight name, a path, or a registered version, models:/NAME/VERSION.",
        ),
        option(TrainingRequest, "overrides", "--set"),
        option(AblationRequest, "folds", type=click.IntRange(0)),
        option(AblationRequest, "seeds", type=click.IntRange(1)),
        option(TrainingRequest, "work_dir"),
        option(TrainingRequest, "reuse", "--reuse/--no-reuse"),
        option(TrainingRequest, "fresh"),
        option(TrainingRequest, "num_gpus", type=click.IntRange(1)),
    ]
    if engines:
        options += [
            option(TrainingRequest, "engine", type=click.Choice([AS_RECIPE, *engines]), default=AS_RECIPE),
            option(TrainingRequest, "scores_from"),
            click.argument("opts", nargs=-1, metavar="[KEY VALUE]..."),
        ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(options):
            command = decorator(command)
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
        register_as=options["register_as"],
        device=options["device"],
        overrides=(*split_words(options["overrides"]), *named, *opts_overrides(split_words(options.get("opts", ())))),
        engine=None if engine == AS_RECIPE else engine,
        work_dir=options["work_dir"],
        reuse=options["reuse"],
        fresh=options["fresh"],
        num_gpus=options["num_gpus"],
        scores_from=options.get("scores_from"),
    )


def split_words(values: Sequence[str]) -> list[str]:
    """Values of ``--set`` or trailing ``KEY VALUE``, each of which may hold several separated by spaces.

    Raises:
        click.UsageError: a quote is not closed.
    """
    try:
        # Together: click parts what an environment variable holds at each space, also between quotes.
        return shlex.split(" ".join(values))
    except ValueError as error:
        raise click.UsageError(f"--set {' '.join(values)}: a quote is not closed") from error
