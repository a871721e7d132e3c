"""Files made from a job's instance table, when it ends or later."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from models.errors import DataError
from models.instances import Instances
from pipelines.data.dataset import Dataset
from scoring.jobs.manifest import Manifest, read_inputs, read_manifest
from scoring.requests import GeoJSON, LayerSettings
from scoring.writers import coco, geojson, kaggle, layer, overlays, parquet

log = logging.getLogger(__name__)

# Of a manifest's settings: the score from which planes are in kaggle.csv.
KAGGLE_THRESHOLD = "kaggle_score_threshold"
# What a job makes, and what is made of its table later.
FORMATS = ("coco", "kaggle", "geojson", "overlays")
LAYERS = tuple(layer.ENDINGS)


def export(
    predictions: Iterable[Instances],
    dataset: Dataset,
    folder: Path,
    formats: Collection[str],
    *,
    rle: kaggle.Convention = "course",
    form: GeoJSON = "rfc7946",
    most: int = 3,
    kaggle_threshold: float = 0.0,
) -> None:
    """Write coco_results.json, kaggle.csv, geojson/ and overlays/ (up to ``most``), those of ``formats``.

    ``predictions`` is iterated once for each of them, in the data set's order. Planes below ``kaggle_threshold`` are
    left out of kaggle.csv.
    """
    if "coco" in formats:
        coco.write_results(predictions, dataset, folder / "coco_results.json")
    if "kaggle" in formats:
        shown = predictions if not kaggle_threshold else _Above(predictions, kaggle_threshold)
        kaggle.write_submission(shown, dataset, folder / "kaggle.csv", rle)
    if "geojson" in formats:
        geojson.write_geojson(predictions, dataset, folder / "geojson", form)
    if "overlays" in formats:
        overlays.write_overlays(predictions, dataset, folder / "overlays", most)


def export_job(
    job: Path,
    out: Path,
    formats: Collection[str],
    *,
    score_threshold: float | None = None,
    rle: kaggle.Convention = "course",
    form: GeoJSON = "rfc7946",
    settings: LayerSettings | None = None,
    most: int = 3,
) -> int:
    """Write files from the table of a job's folder, planes below ``score_threshold`` left out; return how many are left.

    ``settings``: of map layers, see `write_layers`. Without a threshold all planes, but in kaggle.csv those from the
    version's suggested one on, if it has any.

    Raises:
        DataError: not the folder of a job, a job that is not finished, no masks for ``kaggle``, no place for a layer.
    """
    manifest = read_manifest(job)
    try:
        return _export(
            job, manifest, out, formats, score_threshold=score_threshold, rle=rle, form=form, settings=settings, most=most
        )
    except (DataError, KeyError, OSError) as error:
        if read_manifest(job) != manifest:
            raise DataError(f"{job}: was updated meanwhile; call again") from error
        raise


def _export(
    job: Path,
    manifest: Manifest,
    out: Path,
    formats: Collection[str],
    *,
    score_threshold: float | None,
    rle: kaggle.Convention,
    form: GeoJSON,
    settings: LayerSettings | None,
    most: int,
) -> int:
    dataset = read_inputs(job, manifest)
    table = job / "instances.parquet"
    if not table.exists():
        raise DataError(f"{job}: the scoring is not finished; the same score command goes on with it")
    predictions = _Above(parquet.InstanceTable(table), score_threshold or 0.0)
    least = manifest.settings.get(KAGGLE_THRESHOLD, 0.0) if score_threshold is None else 0.0
    if "kaggle" in formats and any(p.masks is None for p in predictions):
        raise DataError(f"{job}: its planes have no masks, so there is no Kaggle CSV of it")
    out.mkdir(parents=True, exist_ok=True)
    made = [name for name in LAYERS if name in formats]
    if made:
        rows = layer.write_layers(
            predictions, dataset, out, made, version=manifest.label, settings=settings or LayerSettings()
        )
        log.info(f"{rows} planes on the map, of {sum(map(len, predictions))} in all images")
    export(predictions, dataset, out, formats, rle=rle, form=form, most=most, kaggle_threshold=least)
    if read_manifest(job) != manifest:
        raise DataError(f"{job}: was updated meanwhile")
    return sum(map(len, predictions))


class _Above:
    """The planes of a table that score at least ``threshold``, each time it is iterated."""

    def __init__(self, table: Iterable[Instances], threshold: float) -> None:
        self.table, self.threshold = table, threshold

    def __iter__(self) -> Iterator[Instances]:
        return (instances.above(self.threshold) for instances in self.table)
