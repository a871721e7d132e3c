"""Entry point ``train_maskrcnn``: train Mask R-CNN and register it."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.commands import Command
from pipelines.steps.options import HEADINGS, request_from, training_options


@click.command(
    cls=Command,
    headings=HEADINGS,
    env="PLANES_TRAIN_MASKRCNN",
    examples=("planes train-maskrcnn --recipe demo_maskrcnn --data path/to/yours",),
    reports=True,
)
@training_options("demo_maskrcnn", "planes-mask", ("torchvision", "detectron2"))
@friendly
def main(**options: Any) -> None:
    """Train Mask R-CNN on planes and their outlines, log it to MLflow and register it.

    KEY VALUE pairs are Detectron2's settings, such as SOLVER.BASE_LR 0.0005.
    """
    from pipelines.steps.training import run_training

    run_training(request_from("maskrcnn", options), folds=options["folds"], seeds=options["seeds"])


if __name__ == "__main__":
    main()
