"""Entry point ``prepare_data``: write the synthetic airfield."""

from __future__ import annotations

from pathlib import Path

import click

from models.errors import DataError
from pipelines.steps.cli_support import friendly, show_progress
from pipelines.steps.commands import Command, files
from pipelines.steps.reporting import record


@click.command(
    cls=Command,
    env="PLANES_PREPARE_DATA",
    examples=("planes prepare-data --out data/airfield --train 60 --test 12",),
    reports=True,
)
@click.option("--out", default="data/airfield", show_default=True, shell_complete=files, help="Folder to write.")
@click.option("--train", default=60, show_default=True, type=click.IntRange(1), help="Training scenes.")
@click.option("--test", default=12, show_default=True, type=click.IntRange(1), help="Test scenes.")
@click.option("--size", default=1024, show_default=True, type=click.IntRange(256, 8192), help="Scene side in pixels.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Same seed, same bytes.")
@friendly
def main(*, out: str, train: int, test: int, size: int, seed: int) -> None:
    """Draw synthetic airfields with exact boxes and masks: train/, test/ and COCO JSON."""
    prepare(out, train=train, test=test, size=size, seed=seed)


def prepare(out: str, *, train: int = 60, test: int = 12, size: int = 1024, seed: int = 0) -> None:
    """Write the airfield, unless it is there already.

    Raises:
        DataError: the folder holds something else or cannot be written.
    """
    from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield

    settings = AirfieldSettings(train=train, test=test, size=size, seed=seed)
    try:
        made = prepare_airfield(Path(out), settings, lambda items, total: show_progress(items, total, "scenes"))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    click.echo(f"{out}: {'made' if made else 'already there'}, {train} training and {test} test scenes")
    record(folder=out, train=train, test=test, made=made)


if __name__ == "__main__":
    main()
