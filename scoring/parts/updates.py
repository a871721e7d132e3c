"""A job in parts brought up to date: a plan of what is new is added, and what is gone is taken from the tables.

An update is a generation: its images lie in parts of their own after the earlier ones, whose files stay as they are
but for rows of images that are gone, or that are scored anew since their files have changed.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import DataError, OutputError, one_line
from pipelines.data.readers.listing import Listing
from pipelines.data.remote import ASKING
from scoring.jobs.manifest import Generation
from scoring.parts.part import Mark, read_mark, read_table, recounted, write_mark
from scoring.parts.place import Place
from scoring.parts.plan import (
    DONE,
    ERRORS,
    GENERATIONS,
    GONE,
    INPUTS,
    INSTANCES,
    Plan,
    file_of,
    numbers_of,
    read_plan,
    update_file,
)
from scoring.parts.planning import plan_changes


def updated(place: Place, plan: Plan, listing: Listing, requested: dict[str, Any], staging: Path) -> Plan:
    """List the images of a finished job anew, and add a generation to its plan where they are others.

    Args:
        requested: fields of the plan that decide the rows.
        staging: folder of this machine to work in.

    Returns:
        The plan with the new generation, in which nothing is scored yet, or the plan as it was.

    Raises:
        DataError: the images cannot be listed, or there are none, which is not taken for an update.
        OutputError: the place cannot be read or written.
    """
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        held = _lists_of_images(place, plan, staging / "held")
        changes = plan_changes(listing, staging, held, part_size=plan.part_size, first=plan.numbers.stop)
        if not changes.listed.images and not changes.losing:
            return plan
        number = plan.generations[-1].generation + 1
        kept = changes.total - changes.new - changes.changed
        at = changes.listed.at
        counts = {"new": changes.new, "changed": changes.changed, "gone": changes.gone, "unreadable": changes.unreadable}
        one = Plan(
            **requested,
            inputs=changes.listed.digest,
            images=changes.listed.images,
            planned=at,
            generation=number,
            first=plan.numbers.stop,
            removed=f"removed-{number:04d}-{changes.digest}" if changes.losing else "",
            losing=changes.losing,
            follows=plan.generations[-1].digest,
            news=Generation(number=number, at=at, images=changes.total, kept=kept, **counts),
        )
        publish_all(place, one.folder, changes.listed.folder)
        if one.removed:
            publish_all(place, one.removed, changes.removed)
        # Whoever was first decides, where two update at once.
        place.create(f"{GENERATIONS}/{update_file(number)}", one.text.encode())
    except OSError as error:
        why = error.strerror or one_line(error)
        raise OutputError(f"{staging}: cannot be used ({why}); what is done is kept, call again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return read_plan(place) or plan


def publish_all(place: Place, folder: str, source: Path) -> None:
    """Put the files of a folder of this machine into one of a place, as far as they are not there."""
    there = set(place.names(folder))
    waiting = [file.name for file in sorted(source.iterdir()) if file.name not in there]
    with ThreadPool(_asking(place)) as pool:
        for _ in pool.imap_unordered(lambda name: place.publish(f"{folder}/{name}", source / name), waiting):
            pass


def read_marks(place: Place, plan: Plan) -> dict[int, Mark]:
    """The marks of all parts that are done, of all generations."""
    done = sorted(n for n in numbers_of(place.names(DONE)) if n in plan.numbers)
    with ThreadPool(_asking(place)) as pool:
        read = pool.map(lambda n: read_mark(place, plan.of(n), n), done)
    return {number: mark for number, mark in zip(done, read, strict=True) if mark is not None}


def amend(place: Place, plan: Plan, marks: dict[int, Mark]) -> dict[int, Mark]:
    """Take from the tables what the updates of a plan remove and is still there; return the marks as they are then.

    Rows of images that are gone go to the folder ``gone``. A stop at any point is made up for by the next call.

    Raises:
        DataError: a table is damaged.
        OutputError: the place cannot be written.
    """
    amended = dict(marks)
    for update in plan.later:
        # In their order: a part that one has amended was amended by those before it.
        waiting = [n for n in update.losing if n in amended and amended[n].amended < update.generation]
        if not waiting:
            continue
        with ThreadPool(_asking(place)) as pool:
            results = pool.starmap(_amend_part, [(place, plan, update, n, amended[n]) for n in waiting])
        amended |= dict(zip(waiting, results, strict=True))
    return amended


def _amend_part(place: Place, plan: Plan, update: Plan, number: int, mark: Mark) -> Mark:
    file = file_of(number)
    removed = read_table(place, f"{update.removed}/{file}")
    lost = pc.field("image_id").isin(removed["image_id"].combine_chunks())
    gone = removed.filter(removed["gone"])["image_id"].combine_chunks()
    tables = {name: read_table(place, f"{name}/{file}") for name in (INPUTS, INSTANCES, ERRORS)}
    for name in (INPUTS, INSTANCES):
        target = f"{GONE}/{update.generation:04d}/{name}"
        # Only whoever comes first sees all rows: a stop may have left the tables without some.
        if len(gone) and file not in place.names(target):
            _write(place, f"{target}/{file}", tables[name].filter(pc.field("image_id").isin(gone)))
    listed = f"{plan.of(number).folder}/{file}"
    left = {}
    for name, path in ((listed, listed), *((name, f"{name}/{file}") for name in tables)):
        table = read_table(place, path) if name == listed else tables[name]
        left[name] = table.filter(~lost)
        if left[name].num_rows < table.num_rows:
            _write(place, path, left[name])
    now = recounted(mark, inputs=left[INPUTS], instances=left[INSTANCES], errors=left[ERRORS])
    # Which images were too dark or pale is not known any more, only how many.
    totals = replace(now.totals, little=0, first_little="")
    now = now._replace(totals=totals, amended=update.generation)
    write_mark(place, plan.of(number), number, now)
    return now


def _lists_of_images(place: Place, plan: Plan, folder: Path) -> Sequence[Path]:
    """The job's lists of images as files of this machine."""
    names = [file_of(number) for number in plan.numbers]
    for name in sorted(set(names) - set(place.names(INPUTS))):
        raise DataError(f"{place}/{INPUTS}/{name}: absent; score with --fresh")
    if place.local is not None:
        return [place.local / INPUTS / name for name in names]
    folder.mkdir(parents=True)
    with ThreadPool(_asking(place)) as pool:
        for _ in pool.imap_unordered(lambda name: (folder / name).write_bytes(place.read(f"{INPUTS}/{name}")), names):
            pass
    return [folder / name for name in names]


def _write(place: Place, name: str, table: pa.Table) -> None:
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd", row_group_size=max(1, table.num_rows))
    place.write(name, content.getvalue())


def _asking(place: Place) -> int:
    return ASKING if place.local is None else 1
