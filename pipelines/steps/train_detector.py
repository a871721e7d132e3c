"""Entry point ``train_detector``: train a box detector and register it."""

from __future__ import annotations

from typing import Any

import click

from pipelines.steps.edge import friendly
from pipelines.steps.training import report, request_from, train_and_register, training_options


@click.command()
@training_options("demo_detector", "planes-det")
@friendly
def main(**options: Any) -> None:
    """Train a detector of planes, log it to MLflow and register it."""
    report(train_and_register(request_from("detector", options)), "detector")


if __name__ == "__main__":
    main()
