"""Entry point ``train_unet``: train a crop segmenter and register it."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.commands import Command
from pipelines.steps.options import HEADINGS, request_from, training_options


@click.command(
    cls=Command,
    headings=HEADINGS,
    env="PLANES_TRAIN_UNET",
    examples=("planes train-unet --recipe unet_scratch --data path/to/yours",),
    reports=True,
)
@training_options("demo_unet", "planes-unet")
@friendly
def main(**options: Any) -> None:
    """Train a segmenter of planes in their box crops, log it to MLflow and register it."""
    from pipelines.steps.training import run_training

    run_training(request_from("unet", options), folds=options["folds"], seeds=options["seeds"])


if __name__ == "__main__":
    main()
