"""Entry point ``train_detector``: train a box detector and register it."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.commands import Command
from pipelines.steps.options import HEADINGS, request_from, training_options


@click.command(
    cls=Command,
    headings=HEADINGS,
    env="PLANES_TRAIN_DETECTOR",
    examples=("planes train-detector --recipe detector_scratch --data path/to/yours",),
    reports=True,
)
@training_options("demo_detector", "planes-det", ("torchvision", "detectron2"))
@friendly
def main(**options: Any) -> None:
    """Train a detector of planes, log it to MLflow and register it.

    KEY VALUE pairs are Detectron2's settings, such as SOLVER.BASE_LR 0.0005.
    """
    from pipelines.steps.training import run_training

    run_training(request_from("detector", options), folds=options["folds"], seeds=options["seeds"])


if __name__ == "__main__":
    main()
