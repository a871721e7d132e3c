"""Several scorings of the same images to one table; metrics come from pipelines.evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from models.errors import DataError

# First the numbers that people look for, then the rest as they come.
ORDER = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "mask_AP", "mask_AP50", "IoU", "Dice")


@dataclass(frozen=True)
class Scored:
    """One column of the comparison: what was scored, on which data, with which result."""

    label: str
    data: str
    digest: str
    metrics: Mapping[str, float]
    images: int
    seconds: float


def check_same_data(runs: Sequence[Scored]) -> None:
    """Refuse to compare over different images.

    Raises:
        DataError: naming the runs and data sets that differ.
    """
    first = runs[0]
    for other in runs[1:]:
        if other.digest != first.digest:
            raise DataError(
                f"{other.label} was scored on {other.data} (digest {other.digest}), "
                f"{first.label} on {first.data} (digest {first.digest}); only equal data can be compared"
            )


def comparison_table(runs: Sequence[Scored]) -> pd.DataFrame:
    """One row per run; metrics as columns in reading order, then images per second.

    Raises:
        DataError: the runs are over different images.
    """
    check_same_data(runs)
    present = {k for r in runs for k in r.metrics}
    columns = [k for k in ORDER if k in present]
    rows = []
    for run in runs:
        row: dict[str, object] = {"model": run.label, **{k: run.metrics.get(k, math.nan) for k in columns}}
        row["images"] = run.images
        row["images/s"] = run.images / run.seconds if run.seconds else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def render(table: pd.DataFrame) -> str:
    """The table as text for a terminal."""
    return table.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.3f}")
