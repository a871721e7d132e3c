"""Entry point ``compose``: a detector version and a segmenter version become an instance segmenter version."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import friendly


@click.command()
@click.option("--detector", default="planes-det/latest", show_default=True, help="NAME/VERSION, NAME/ALIAS or a folder.")
@click.option("--segmenter", default="planes-unet/latest", show_default=True, help="NAME/VERSION, NAME/ALIAS or a folder.")
@click.option("--name", default="planes-inst", show_default=True, help="Registered model to add a version to.")
@click.option("--data", default="data/airfield", show_default=True, help="Data to evaluate on; its test split is used.")
@click.option(
    "--overlaps",
    default="exclusive",
    show_default=True,
    type=click.Choice(["exclusive", "keep"]),
    help="exclusive: a pixel belongs to the plane of the higher score.",
)
@click.option("--min-score", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Least score to segment.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--reuse/--no-reuse", default=False, help="Take the version of an equal composition, if there is one.")
@friendly
def main(**options: Any) -> None:
    """Compose planes-det and planes-unet into planes-inst, evaluate, log and register it.

    The version holds both components and loads alone; its tags name the versions they came from.
    """
    from pipelines.registry.model_versions import Registry
    from pipelines.use_cases.compose import ComposeRequest, compose

    compose(Registry.connect(), ComposeRequest(**options))


if __name__ == "__main__":
    main()
