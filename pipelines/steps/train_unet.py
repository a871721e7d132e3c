"""Entry point ``train_unet``: train a crop segmenter and register it."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.edge import friendly
from pipelines.steps.training import report, request_from, train_and_register, training_options


@click.command()
@training_options("demo_unet", "planes-unet")
@friendly
def main(**options: Any) -> None:
    """Train a segmenter of planes in their box crops, log it to MLflow and register it."""
    report(train_and_register(request_from("unet", options)), "segmenter")


if __name__ == "__main__":
    main()
