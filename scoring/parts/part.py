"""One part of a job: a job of its own while it is scored, published where the parts lie, and counted by a mark."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataError, one_line
from pipelines.data.dataset import Dataset
from pipelines.files import write_text
from pipelines.progress import Progress
from scoring.jobs.completing import complete
from scoring.jobs.manifest import DONE as DONE_MARK
from scoring.jobs.manifest import INPUTS as INPUT_TABLE
from scoring.jobs.manifest import MANIFEST, Manifest, input_rows
from scoring.jobs.retry import FOR_NOW, failed_before
from scoring.jobs.shards import ERRORS as ERROR_TABLE
from scoring.jobs.shards import INSTANCES as INSTANCE_TABLE
from scoring.jobs.shards import Totals, write_totals
from scoring.parts.place import Place
from scoring.parts.plan import DONE, ERRORS, INPUTS, INSTANCES, Plan, file_of
from scoring.requests import JobSettings
from scoring.runners.runner import Runner
from scoring.writers import parquet

# Ids of the images of a part that are tried again.
TRIED = "tried.json"
# What is published of a part, by the folder that it goes to; the mark in DONE comes last.
TABLES = {INSTANCES: INSTANCE_TABLE, ERRORS: ERROR_TABLE, INPUTS: INPUT_TABLE}


class Mark(NamedTuple):
    """What says that a part is done.

    Attributes:
        totals: its sums.
        again: how many of its images could not be had and may be had later.
        amended: the last update that took images from it; 0 for none.
    """

    totals: Totals
    again: int = 0
    amended: int = 0


def read_mark(place: Place, plan: Plan, number: int) -> Mark | None:
    """The mark of a part that is done; None of one that is damaged, or of another plan: a removal was stopped."""
    try:
        content = json.loads(place.read(f"{DONE}/{file_of(number, '.json')}"))
        mark = Mark(Totals(**content["totals"]), content["again"], content.get("amended", 0))
        return mark if content["plan"] == plan.digest else None
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None


def write_mark(place: Place, plan: Plan, number: int, mark: Mark) -> None:
    """Say that a part is done.

    Raises:
        OutputError: the place cannot be written.
    """
    content = {"plan": plan.digest, "totals": asdict(mark.totals), "again": mark.again}
    content |= {"amended": mark.amended} if mark.amended else {}
    place.write(f"{DONE}/{file_of(number, '.json')}", (json.dumps(content) + "\n").encode())


def score_part(
    runner: Runner,
    place: Place,
    plan: Plan,
    number: int,
    *,
    scratch: Path,
    settings: JobSettings,
    progress: Progress,
    again: Mark | None = None,
) -> Mark:
    """Score the images of a part, or go on where a kill stopped that, publish its tables and then its mark.

    Args:
        scratch: folder of this part alone, on this machine; removed at the end.
        again: of a part that is done: only images that could not be had are tried again.

    Raises:
        DataError: the plan is damaged.
        OutputError: the place cannot be written.
        OSError: the scratch cannot be written.
    """
    plan = plan.of(number)
    dataset = plan.dataset(place, number)
    manifest = plan.manifest(dataset)
    text = manifest.model_dump_json()
    begun = (scratch / MANIFEST).exists() and (scratch / MANIFEST).read_text() == text
    if not begun:
        # Another part, or files that have changed since: what is there is of no use.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if again is not None:
            for folder, name in ((INSTANCES, INSTANCE_TABLE), (ERRORS, ERROR_TABLE)):
                (scratch / name).write_bytes(place.read(f"{folder}/{file_of(number)}"))
            write_totals(scratch / DONE_MARK, again.totals)
        write_text(scratch / MANIFEST, text)
    tried = None if again is None else _tried(scratch, manifest, dataset)
    # Where a stop has left a retry that is scored, its tables are to be published still.
    if again is not None and not tried and not begun:
        mark = recounted(again, **_tables_of(place, number))
        if mark != again:
            write_mark(place, plan, number, mark)
        shutil.rmtree(scratch, ignore_errors=True)
        return mark
    _, totals = complete(runner, manifest, scratch, dataset, settings=settings, progress=progress, held=None)
    _write_inputs(place, number, scratch, dataset, generation=plan.generation, again=tried)
    failures = parquet.read_failures(scratch / ERROR_TABLE)
    mark = Mark(totals, sum(f.kind in FOR_NOW for f in failures), again.amended if again else 0)
    there = read_mark(place, plan, number)
    if there is not None and there != again:
        # Another machine was first, and may have brought the job up to date since.
        shutil.rmtree(scratch, ignore_errors=True)
        return there
    for folder, name in TABLES.items():
        place.publish(f"{folder}/{file_of(number)}", scratch / name)
    write_mark(place, plan, number, mark)
    shutil.rmtree(scratch, ignore_errors=True)
    return mark


def recounted(mark: Mark, *, inputs: pa.Table, instances: pa.Table, errors: pa.Table) -> Mark:
    """The mark with the sums that its part's tables have."""
    failures = errors.num_rows
    totals = replace(mark.totals, images=inputs.num_rows - failures, instances=instances.num_rows, failures=failures)
    return mark._replace(totals=totals, again=sum(kind in FOR_NOW for kind in errors["kind"].to_pylist()))


def _tables_of(place: Place, number: int) -> dict[str, pa.Table]:
    return {name: read_table(place, f"{name}/{file_of(number)}") for name in (INPUTS, INSTANCES, ERRORS)}


def read_table(place: Place, name: str) -> pa.Table:
    """A parquet file of a place.

    Raises:
        DataError: it is absent or damaged.
    """
    try:
        return pq.read_table(io.BytesIO(place.read(name)))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{place}/{name}: absent or damaged ({one_line(error, 120)}); score with --fresh") from error


def _tried(scratch: Path, manifest: Manifest, dataset: Dataset) -> set[str]:
    """Ids of the images that are tried again, those that a stopped call has tried included; kept for the next one."""
    known = set(json.loads((scratch / TRIED).read_text())) if (scratch / TRIED).exists() else set()
    for shard, positions in failed_before(scratch, manifest, dataset).items():
        known |= {dataset.samples[shard * manifest.shard_size + one].image_id for one in positions}
    write_text(scratch / TRIED, json.dumps(sorted(known)))
    return known


def _write_inputs(
    place: Place, number: int, scratch: Path, dataset: Dataset, *, generation: int, again: set[str] | None
) -> None:
    """The list of the part's images with the marks of their files before they were scored.

    Args:
        again: ids of the images that were tried again; None where all were scored.
    """
    rows = input_rows(dataset)
    index = rows.schema.get_field_index("generation")
    rows = rows.set_column(index, rows.schema.field(index), pa.array([generation] * len(dataset), pa.int32()))
    if again is not None:
        earlier = pq.read_table(io.BytesIO(place.read(f"{INPUTS}/{file_of(number)}")))["digest"].to_pylist()
        now = zip(rows["image_id"].to_pylist(), rows["digest"].to_pylist(), earlier, strict=True)
        digests = pa.array([new if image_id in again else old for image_id, new, old in now], pa.string())
        rows = rows.set_column(rows.schema.get_field_index("digest"), "digest", digests)
    pq.write_table(rows, scratch / INPUT_TABLE, compression="zstd")
