"""Files made from a job's instance table, when it ends or later."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from models.errors import DataError
from models.instances import Instances
from pipelines.data.dataset import Dataset
from scoring.jobs.manifest import read_inputs, read_manifest
from scoring.writers import coco, geojson, kaggle, overlays, parquet

FORMATS = ("coco", "kaggle", "geojson", "overlays")


def export(
    predictions: Iterable[Instances],
    dataset: Dataset,
    folder: Path,
    formats: Collection[str],
    *,
    rle: kaggle.Convention = "course",
    most: int = 3,
) -> None:
    """Write coco_results.json, kaggle.csv, geojson/ and overlays/ (up to ``most``), those of ``formats``.

    ``predictions`` is iterated once for each of them, in the data set's order.
    """
    if "coco" in formats:
        coco.write_results(predictions, dataset, folder / "coco_results.json")
    if "kaggle" in formats:
        kaggle.write_submission(predictions, dataset, folder / "kaggle.csv", rle)
    if "geojson" in formats:
        geojson.write_geojson(predictions, dataset, folder / "geojson")
    if "overlays" in formats:
        overlays.write_overlays(predictions, dataset, folder / "overlays", most)


def export_job(
    job: Path,
    out: Path,
    formats: Collection[str],
    *,
    score_threshold: float = 0.0,
    rle: kaggle.Convention = "course",
    most: int = 3,
) -> int:
    """Write files from the table of a job's folder, planes below ``score_threshold`` left out; return how many planes.

    Raises:
        DataError: not the folder of a job, a job that is not finished, or no masks for ``kaggle``.
    """
    dataset = read_inputs(job, read_manifest(job))
    table = job / "instances.parquet"
    if not table.exists():
        raise DataError(f"{job}: the scoring is not finished; the same score command goes on with it")
    predictions = _Above(parquet.InstanceTable(table), score_threshold)
    if "kaggle" in formats and any(p.masks is None for p in predictions):
        raise DataError(f"{job}: its planes have no masks, so there is no Kaggle CSV of it")
    out.mkdir(parents=True, exist_ok=True)
    export(predictions, dataset, out, formats, rle=rle, most=most)
    return sum(map(len, predictions))


class _Above:
    """The planes of a table that score at least ``threshold``, each time it is iterated."""

    def __init__(self, table: Iterable[Instances], threshold: float) -> None:
        self.table, self.threshold = table, threshold

    def __iter__(self) -> Iterator[Instances]:
        return (instances.above(self.threshold) for instances in self.table)
