"""Shards of a scoring job: a folder each, there whole or not at all, joined into the job's tables."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models.instances import Instances
from models.saved.scores import Scores
from pipelines.files import flush, replacing
from scoring.jobs.manifest import DONE, SHARDS
from scoring.reader import Failure
from scoring.writers import parquet

INSTANCES, ERRORS, NOTES = "instances.parquet", "errors.parquet", "shard.json"


@dataclass(frozen=True)
class Totals:
    """Sums over all shards.

    Attributes:
        images: how many were predicted.
        instances: planes detected in them.
        failures: images that could not be read or predicted.
        seconds: of work.
        masks: whether masks were made.
        timings: seconds by operation, of all threads together (``stages`` in done.json).
        little: how many images fill little of the range that they are read with.
        first_little: id of the first of them.
    """

    images: int
    instances: int
    failures: int
    seconds: float
    masks: bool
    timings: dict[str, float] = field(default_factory=dict)
    little: int = 0
    first_little: str = ""


def shard_folder(folder: Path, number: int) -> Path:
    """Where a shard is: six digits, and as many more as it takes."""
    return folder / SHARDS / f"{number:06d}"


def finished(folder: Path) -> set[int]:
    """Numbers of the shards that are there; half-written ones of a killed process are removed."""
    numbers = set()
    for path in (folder / SHARDS).iterdir() if (folder / SHARDS).is_dir() else ():
        if re.fullmatch(r"\d{6,}", path.name):
            numbers.add(int(path.name))
        elif re.fullmatch(r"\.(old-)?\d{6,}", path.name):
            shutil.rmtree(path, ignore_errors=True)
    return numbers


def write_shard(
    folder: Path,
    number: int,
    results: Sequence[Instances | Failure],
    *,
    seconds: float,
    timings: Mapping[str, float],
    little: Sequence[str] = (),
) -> None:
    """Write one shard, in place of an earlier one: temporary folder, fsync, rename.

    Args:
        folder: of the job.
        number: of the shard.
        results: of its images, in order.
        seconds: that its images took.
        timings: the same by operation; the time of writing is added here.
        little: ids of its images that fill little of their range.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    started = time.perf_counter()
    predictions = [r for r in results if isinstance(r, Instances)]
    failures = [r for r in results if isinstance(r, Failure)]
    target = shard_folder(folder, number)
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        parquet.write_instances(predictions, temporary / INSTANCES)
        parquet.write_failures(failures, temporary / ERRORS)
        for name in (INSTANCES, ERRORS):
            flush(temporary / name)
        counts = {"images": len(predictions), "instances": sum(map(len, predictions)), "failures": len(failures)}
        notes: dict[str, Any] = {**counts, "seconds": seconds}
        notes["masks"] = any(p.masks is not None for p in predictions)
        notes["little"] = list(little)
        notes["stages"] = {**timings, "write": time.perf_counter() - started}
        (temporary / NOTES).write_text(json.dumps(notes))
        for path in (temporary / NOTES, temporary):
            flush(path)
        old = target.with_name(f".old-{target.name}")
        if target.exists():
            # A kill between the two renames leaves the shard to be made again.
            os.rename(target, old)
        os.rename(temporary, target)
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def totals_of(folder: Path) -> Totals | None:
    """Read the totals of a finished job and remove its shards; None where shards are missing or not yet joined."""
    path = folder / DONE
    if not path.exists():
        return None
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    content = json.loads(path.read_text())
    return Totals(timings=content.pop("stages", {}), **content)


def join_shards(folder: Path, count: int, scores: Scores | None = None) -> None:
    """Write the job's instances.parquet and errors.parquet, a row group per shard, then done.json.

    Args:
        scores: of the version, which say how probable a detection of a score is.
    """
    shards = [shard_folder(folder, i) for i in range(count)]
    for name, schema, more in ((INSTANCES, parquet.SCHEMA, scores), (ERRORS, parquet.ERROR_SCHEMA, None)):
        with replacing(folder / name, durable=True) as temporary:
            parquet.join_tables([shard / name for shard in shards], temporary, schema, more)
    write_totals(folder / DONE, totals_of_shards(shards))


def totals_of_shards(shards: Sequence[Path]) -> Totals:
    """Sums over the folders of shards."""
    return sums(_noted(json.loads((shard / NOTES).read_text())) for shard in shards)


def _noted(notes: Mapping[str, Any]) -> Totals:
    counts = {key: notes[key] for key in ("images", "instances", "failures", "seconds", "masks")}
    # Shards of 0.6.0 have no such list.
    little = notes.get("little", [])
    return Totals(**counts, timings=notes["stages"], little=len(little), first_little=next(iter(little), ""))


def sums(totals: Iterable[Totals]) -> Totals:
    """Totals of several shards or parts together."""
    every = list(totals)
    counts = {key: sum(getattr(t, key) for t in every) for key in ("images", "instances", "failures", "seconds", "little")}
    timings: defaultdict[str, float] = defaultdict(float)
    for operation, seconds in (item for t in every for item in t.timings.items()):
        timings[operation] += seconds
    first = next((t.first_little for t in every if t.first_little), "")
    return Totals(**counts, masks=any(t.masks for t in every), timings=dict(timings), first_little=first)


def write_totals(path: Path, totals: Totals) -> None:
    """Write done.json, whole or not at all."""
    with replacing(path, durable=True) as temporary:
        temporary.write_text(json.dumps({"stages" if k == "timings" else k: v for k, v in asdict(totals).items()}) + "\n")
