"""Images that could not be fetched when a job ran, tried again when it is called again; all others keep their rows."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from scoring.jobs.manifest import DONE, LOGGED, UNLOGGED, Manifest
from scoring.jobs.shards import ERRORS, INSTANCES, NOTES, Totals, finished, shard_folder, totals_of, write_shard
from scoring.reader import Failure
from scoring.writers import parquet
from scoring.writers.walk import side_by_side

UNREACHABLE, MISSING, DENIED = "unreachable", "missing", "permission denied"
# Kinds of failures that say nothing about the image.
FOR_NOW = (UNREACHABLE, MISSING, DENIED)


def can_be_tried_again(failure: Failure, sample: Sample) -> bool:
    """Whether a failed image may work now: a store that did not answer, a file of this machine that is there by now."""
    if failure.kind == UNREACHABLE:
        return True
    if not isinstance(sample.path, Path):
        return False
    try:
        if failure.kind == DENIED:
            return os.access(sample.path, os.R_OK)
        return failure.kind == MISSING and sample.path.exists()
    except OSError:
        return False


def failed_before(folder: Path, manifest: Manifest, dataset: Dataset) -> dict[int, list[int]]:
    """Shard -> positions in it of the images of its finished shards, or of the finished job, that are worth another try."""
    if totals_of(folder) is not None:
        failures = parquet.read_failures(folder / ERRORS)
    else:
        shards = sorted(finished(folder))
        failures = [f for i in shards for f in parquet.read_failures(shard_folder(folder, i) / ERRORS)]
    by_id = {f.image_id: f for f in failures if f.kind in FOR_NOW}
    positions: defaultdict[int, list[int]] = defaultdict(list)
    for number, sample in enumerate(dataset.samples if by_id else ()):
        failure = by_id.get(sample.image_id)
        if failure is not None and can_be_tried_again(failure, sample):
            positions[number // manifest.shard_size].append(number % manifest.shard_size)
    return dict(positions)


def split_into_shards(folder: Path, manifest: Manifest, dataset: Dataset, totals: Totals) -> None:
    """Split the tables of a finished job into its shards again, as before they were joined; it is unfinished then."""
    rows = side_by_side(parquet.InstanceTable(folder / INSTANCES), dataset)
    failures = {f.image_id: f for f in parquet.read_failures(folder / ERRORS)}
    for number, positions in enumerate(manifest.shards()):
        results: list[Instances | Failure] = []
        for _ in positions:
            sample, instances = next(rows)
            without_row = failures.get(sample.image_id) or _empty(sample, totals.masks)
            results.append(without_row if instances is None else instances)
        # The seconds of the whole job stand in the first shard.
        seconds, timings = (totals.seconds, totals.timings) if number == 0 else (0.0, {})
        little = [totals.first_little] * totals.little if number == 0 else []
        write_shard(folder, number, results, seconds=seconds, timings=timings, little=little)
    for name in (LOGGED, UNLOGGED):
        # Its outputs will be others, and a run that was begun for the earlier ones is not to hold them.
        (folder / name).unlink(missing_ok=True)
    # Until here a stop changes nothing: shards beside a finished job are removed.
    (folder / DONE).unlink()


def _empty(sample: Sample, masks: bool) -> Instances:
    return Instances.empty(sample.image_id, sample.height, sample.width, masks=masks)


def replace_in_shard(
    folder: Path,
    number: int,
    samples: Sequence[Sample],
    again: dict[int, Instances | Failure],
    *,
    seconds: float,
    little: Sequence[str] = (),
) -> None:
    """Write a finished shard anew with other results for some of its images; the rows of the rest stay as they are."""
    shard = shard_folder(folder, number)
    notes = json.loads((shard / NOTES).read_text())
    predictions = {p.image_id: p for p in parquet.read_instances(shard / INSTANCES)}
    failures = {f.image_id: f for f in parquet.read_failures(shard / ERRORS)}
    results: list[Instances | Failure] = []
    for position, sample in enumerate(samples):
        known = predictions.get(sample.image_id) or failures.get(sample.image_id) or _empty(sample, notes["masks"])
        results.append(again.get(position, known))
    write_shard(
        folder,
        number,
        results,
        seconds=notes["seconds"] + seconds,
        timings=notes["stages"],
        little=[*notes.get("little", []), *little],
    )
