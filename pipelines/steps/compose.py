"""Entry point ``compose``: a detector version and a segmenter version become an instance segmenter version."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.commands import Command
from pipelines.steps.options import option
from pipelines.steps.reporting import record
from pipelines.use_cases.requests import ComposeRequest


@click.command(
    cls=Command,
    headings={
        "What": ("detector", "segmenter", "overlaps", "min_score"),
        "Evaluation": ("data", "device"),
        "MLflow": ("name", "reuse"),
    },
    env="PLANES_COMPOSE",
    examples=("planes compose --detector planes-det/latest --segmenter planes-unet/latest --data path/to/yours",),
    reports=True,
)
@option(ComposeRequest, "detector", default="planes-det/latest")
@option(ComposeRequest, "segmenter", default="planes-unet/latest")
@option(ComposeRequest, "name", default="planes-inst")
@option(ComposeRequest, "data", default="data/airfield")
@option(ComposeRequest, "overlaps")
@option(ComposeRequest, "min_score", type=click.FloatRange(0, 1))
@option(ComposeRequest, "device")
@option(ComposeRequest, "reuse", "--reuse/--no-reuse")
@friendly
def main(**options: Any) -> None:
    """Compose planes-det and planes-unet into planes-inst, evaluate, log and register it.

    The version holds both components and loads alone; its tags name the versions they came from.
    """
    from pipelines.registry.model_versions import Registry
    from pipelines.use_cases.compose import compose

    record(version=compose(Registry.connect(), ComposeRequest(**options)))


if __name__ == "__main__":
    main()
