"""A job brought up to date with other inputs: unchanged images keep their rows, the others are scored.

All is made in the folder ``.update`` of the job and takes its place in one move: a stop at any point leaves the earlier
generation or the new one. What an update scored before it was stopped counts as known, even if the list changed since.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import DataError, one_line
from models.saved.scores import Scores
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.remote import UNREADABLE
from pipelines.files import flush
from pipelines.instance_table import SCHEMA
from scoring.jobs.manifest import (
    DONE,
    GONE,
    INPUT_SCHEMA,
    INPUTS,
    MANIFEST,
    NEWEST,
    PICTURES,
    STAGING,
    Generation,
    Manifest,
    complete_update,
    differ_in_inputs_alone,
    digest_in_order,
    input_rows,
)
from scoring.jobs.retry import FOR_NOW, can_be_tried_again
from scoring.jobs.shards import (
    ERRORS,
    INSTANCES,
    Totals,
    finished,
    shard_folder,
    totals_of,
    totals_of_shards,
    write_totals,
)
from scoring.reader import Failure
from scoring.writers import parquet
from scoring.writers.walk import file_stem

PIECES, MAKING = "pieces", "making"
# Fingerprints that tell a content wherever it lies: of annotated images (sha256).
CONTENT = re.compile("[0-9a-f]{64}")
# Row groups of a table that are held in memory at a time.
MOST_GROUPS = 4
GONE_SCHEMA = INPUT_SCHEMA.append(pa.field("gone_in", pa.int32()))

# Predicts the images of a data set that the shards of a folder, which has a manifest, do not hold yet.
Fill = Callable[[Path, Manifest, Dataset], object]


class _Known(NamedTuple):
    """Where an image's result is."""

    source: _Source
    position: int


class _Input(NamedTuple):
    """An input with what is known of its file; ``size``: (height, width) that its annotation states."""

    sample: Sample
    path: str
    digest: str
    size: tuple[int, int]

    @property
    def sized(self) -> bool:
        """Whether its size decides what becomes of it: it is annotated, and its file could be looked at."""
        return self.sample.truth and self.sample.lost not in ("missing", "unreadable")


class _Source:
    """Results that exist: of a job, finished or not, of an update that was stopped, or of images that are gone.

    Raises:
        DataError: its tables cannot be read.
    """

    def __init__(self, folder: Path, *, joined: bool, shard_size: int) -> None:
        self.folder = folder
        try:
            table = pq.read_table(folder / INPUTS, partitioning=None)
            self.inputs = table.to_pydict()
            numbers = sorted(finished(folder))
            parts = [folder] if joined else [shard_folder(folder, n) for n in numbers]
            self._files = [part / INSTANCES for part in parts]
            failures = [f for part in parts if (part / ERRORS).exists() for f in parquet.read_failures(part / ERRORS)]
            self._places = _places(self._files)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{folder}: its tables cannot be read ({one_line(error, 160)}); score with --fresh") from error
        count = table.num_rows
        shards = [range(n * shard_size, min((n + 1) * shard_size, count)) for n in numbers]
        self.finished = set(range(count)) if joined else {i for shard in shards for i in shard}
        # Jobs of earlier releases have had one generation.
        self.inputs.setdefault("generation", [1] * count)
        self.inputs.setdefault("digest", [UNREADABLE] * count)
        self.ids: list[str] = self.inputs["image_id"]
        self.paths: list[str] = self.inputs["path"]
        self.failures = {f.image_id: f for f in failures}
        self._by_id = {self.ids[i]: i for i in self.finished}
        self._by_path = {self.paths[i]: i for i in self.finished}
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def holds(self, image_id: str, path: str) -> bool:
        """Whether an image of this name or place has a result, whatever it showed then."""
        return image_id in self._by_id or path in self._by_path

    def failed_for_now(self, image_id: str, path: str) -> bool:
        """Whether an image of this name or place could not be had, so that nothing was known of it."""
        i = self._by_path.get(path, self._by_id.get(image_id))
        failure = None if i is None else self.failures.get(self.ids[i])
        return failure is not None and failure.kind in FOR_NOW

    def find(self, one: _Input, *, final: bool = False) -> _Known | None:
        """The result of an unchanged image; None where another try is worth it, unless what is there is final.

        Unchanged is what has the same content, or lies in the same place with the same size and time of change, and is
        still said to have the same size. A file that cannot be looked at now has not changed for all we know.
        """
        i = self._by_path.get(one.path)
        if i is None or (one.digest != self.inputs["digest"][i] and one.digest != UNREADABLE):
            by_content = CONTENT.fullmatch(one.digest) is not None
            i = self._by_id.get(one.sample.image_id) if by_content else None
            if i is None or one.digest != self.inputs["digest"][i]:
                return None
        if one.sized and one.size != (self.inputs["height"][i], self.inputs["width"][i]):
            return None
        failure = self.failures.get(self.ids[i])
        again = failure is not None and not final and can_be_tried_again(failure, one.sample)
        return None if again else _Known(self, i)

    def rows(self, position: int, image_id: str) -> pa.Table | None:
        """The rows of an image, under the name that it has now; None where no plane was detected in it."""
        place = self._places.get(self.ids[position])
        if place is None:
            return None
        file, group, start, stop = place
        table = self._groups.get((file, group))
        if table is None:
            table = pq.ParquetFile(self._files[file]).read_row_group(group, columns=SCHEMA.names).cast(SCHEMA)
            self._groups[file, group] = table
            if len(self._groups) > MOST_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end((file, group))
        rows = table.slice(start, stop - start)
        if image_id == self.ids[position]:
            return rows
        return rows.set_column(0, "image_id", pa.array([image_id] * rows.num_rows, pa.string()))


def _places(files: Sequence[Path]) -> dict[str, tuple[int, int, int, int]]:
    """Image id -> file, row group, first row and end of its rows, which are together."""
    places: dict[str, tuple[int, int, int, int]] = {}
    for number, path in enumerate(files):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["image_id"])["image_id"].combine_chunks()
            runs, start = pc.call_function("run_end_encode", [ids], pc.RunEndEncodeOptions(pa.int64())), 0
            for image_id, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
                places[image_id] = (number, group, start, end)
                start = end
    return places


class _Plan(NamedTuple):
    """Of each input the known result, None where it is scored; how many there are of each kind."""

    known: list[_Known | None]
    counts: dict[str, int]


def bring_up_to_date(
    folder: Path, held: Manifest, requested: Manifest, *, dataset: Dataset, fill: Fill, scores: Scores | None
) -> int:
    """Score what a job's folder does not hold of the inputs, and make it the job of these inputs.

    Its tables are those of a job that scored all of them at once. Rows of images that are not among the inputs any more
    go to the folder ``gone``, and come back with their images.

    Args:
        folder: of the job, held by this process.
        held: its manifest.
        requested: the manifest of the inputs.
        dataset: the inputs.
        fill: predicts images into shards.
        scores: of the version, see `join_shards`.

    Returns:
        How many images were not scored now.

    Raises:
        DataError: the job's tables cannot be read.
        OSError: the disk is full or the folder cannot be written; what was scored is kept.
    """
    rows = input_rows(dataset)
    inputs = _inputs(dataset, rows)
    main = _Source(folder, joined=(folder / DONE).exists(), shard_size=held.shard_size)
    joined = (folder / GONE / INPUTS).exists() and (folder / GONE / INSTANCES).exists()
    gone = _Source(folder / GONE, joined=True, shard_size=1) if joined else None
    plan = _plan(main, _pieces(folder, requested), gone, inputs)
    missing = [i for i, one in enumerate(plan.known) if one is None]
    if missing:
        piece = _begin_piece(folder, requested, rows.take(missing))
        fill(piece, _manifest_of(piece), replace(dataset, samples=tuple(dataset.samples[i] for i in missing)))
        plan = _plan(main, _pieces(folder, requested), gone, inputs, final=True)
    elif _is_the_same(folder, held, requested, dataset=dataset, plan=plan, rows=rows, main=main, gone=gone):
        # But for files that cannot be looked at now.
        return len(dataset)
    _stage(folder, held, requested, dataset=dataset, plan=plan, rows=rows, main=main, gone=gone, scores=scores)
    complete_update(folder)
    return len(dataset) - len(missing)


def _inputs(dataset: Dataset, rows: pa.Table) -> list[_Input]:
    columns = (rows[name].to_pylist() for name in ("path", "digest", "height", "width"))
    return [_Input(s, path, digest, (h, w)) for s, path, digest, h, w in zip(dataset.samples, *columns, strict=True)]


def _is_the_same(
    folder: Path,
    held: Manifest,
    requested: Manifest,
    *,
    dataset: Dataset,
    plan: _Plan,
    rows: pa.Table,
    main: _Source,
    gone: _Source | None,
) -> bool:
    """Whether nothing is to be done: a finished job of these very inputs."""
    known = [one for one in plan.known if one is not None]
    if not (folder / DONE).exists() or plan.counts["kept"] < len(dataset):
        return False
    rows = _with_generations(rows, known, main=main, gone=gone, number=0)
    inputs = digest_in_order(dataset, rows["digest"].to_pylist())
    return requested.model_copy(update={"inputs": inputs, "generations": held.generations}) == held


def _pieces(folder: Path, requested: Manifest) -> list[_Source]:
    """What this update, and earlier ones that were stopped, have scored as it is asked for; the newest first."""
    sources = []
    for piece in sorted((folder / STAGING / PIECES).glob("[0-9]*"), reverse=True):
        try:
            made = _manifest_of(piece)
            usable = _Source(piece, joined=False, shard_size=made.shard_size)
        except (OSError, ValueError, DataError):
            # Begun and not written to its end, or half removed: its images are scored again.
            continue
        if differ_in_inputs_alone(made, requested):
            sources.append(usable)
    return sources


def _manifest_of(piece: Path) -> Manifest:
    return Manifest.model_validate_json((piece / MANIFEST).read_text())


def _begin_piece(folder: Path, requested: Manifest, rows: pa.Table) -> Path:
    """A folder for the images that are to be scored, after those of updates that were stopped."""
    there = sorted((folder / STAGING / PIECES).glob("[0-9]*"))
    piece = folder / STAGING / PIECES / f"{int(there[-1].name) + 1 if there else 1:06d}"
    piece.mkdir(parents=True)
    pq.write_table(rows, piece / INPUTS, compression="zstd")
    flush(piece / INPUTS)
    # Last: a piece without a manifest has nothing.
    manifest = requested.model_copy(update={"images": rows.num_rows, "generations": ()})
    (piece / MANIFEST).write_text(manifest.model_dump_json())
    flush(piece / MANIFEST)
    return piece


def _plan(
    main: _Source, pieces: Sequence[_Source], gone: _Source | None, inputs: Sequence[_Input], *, final: bool = False
) -> _Plan:
    """What is known of the inputs; with ``final`` a failed try of this update is a result too."""
    counts = dict.fromkeys(Generation.KINDS, 0)
    known: list[_Known | None] = []
    for wanted in inputs:
        one, kind = main.find(wanted), "kept"
        if one is None and gone is not None:
            one, kind = gone.find(wanted), "returned"
        if one is None:
            # The newest first, which is the one that has just been tried.
            tries = (piece.find(wanted, final=final) for piece in pieces)
            one = next((t for t in tries if t is not None), None)
            where = (wanted.sample.image_id, wanted.path)
            kind = "retried" if main.failed_for_now(*where) else "changed" if main.holds(*where) else "new"
        known.append(one)
        counts[kind] += 1
    return _Plan(known, counts)


def _stage(
    folder: Path,
    held: Manifest,
    requested: Manifest,
    *,
    dataset: Dataset,
    plan: _Plan,
    rows: pa.Table,
    main: _Source,
    gone: _Source | None,
    scores: Scores | None,
) -> None:
    """Write the tables of the new generation beside the job's, ready to take their place."""
    base = totals_of(folder)
    # A first scoring that was never finished is no generation.
    past = held.generations or ((_first(folder, held),) if (folder / INSTANCES).exists() else ())
    number = len(past) + 1
    making = folder / STAGING / MAKING
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    known = [one for one in plan.known if one is not None]
    tables = _tables(known, dataset, requested)
    instances = parquet.write_joined(tables, making / INSTANCES, parquet.SCHEMA, scores)
    failures = [_failure(one, sample) for one, sample in zip(known, dataset.samples, strict=True)]
    shards = [[f for f in failures[s.start : s.stop] if f] for s in requested.shards()]
    failed = parquet.write_joined(map(parquet.failure_table, shards), making / ERRORS, parquet.ERROR_SCHEMA)
    if failed == len(dataset):
        # The job stays what it is.
        first = next(f for f in failures if f)
        raise DataError(f"none of {failed} images could be scored; the first: {first.message} (what was there is kept)")
    left = _left_over(dataset, rows=rows, main=main, gone=gone, number=number)
    if left or gone:
        _write_gone(making / GONE, left, requested.shard_size)
    digests = rows["digest"].to_pylist()
    rows = _with_generations(rows, known, main=main, gone=gone, number=number)
    pq.write_table(rows, making / INPUTS, compression="zstd")
    spent = base or totals_of_shards([shard_folder(folder, n) for n in sorted(finished(folder))])
    pieces = [piece.folder for piece in _pieces(folder, requested)]
    now = totals_of_shards([shard_folder(p, n) for p in pieces for n in sorted(finished(p))])
    timings: defaultdict[str, float] = defaultdict(float, spent.timings)
    for operation, seconds in now.timings.items():
        timings[operation] += seconds
    totals = Totals(
        len(dataset) - failed,
        instances,
        failed,
        spent.seconds + now.seconds,
        spent.masks or now.masks,
        timings=dict(timings),
        # Those of the images that were scored now.
        little=now.little,
        first_little=now.first_little,
    )
    write_totals(making / DONE, totals)
    newly_gone = sum(gone_in == number for *_, gone_in in left)
    # A failure that is kept says itself what is wrong with the file.
    away = sum(
        digest == UNREADABLE and one.source in (main, gone) and failure is None
        for digest, one, failure in zip(digests, known, failures, strict=True)
    )
    news = Generation(number=number, at=_now(), images=len(dataset), gone=newly_gone, unreadable=away, **plan.counts)
    inputs = digest_in_order(dataset, rows["digest"].to_pylist())
    manifest = requested.model_copy(update={"inputs": inputs, "generations": (*past, news)})
    (making / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    for path in (*making.rglob("*"), making):
        flush(path)
    _remove_pictures(folder, set(main.ids) - {main.ids[one.position] for one in known if one.source is main})
    os.rename(making, folder / STAGING / NEWEST)
    flush(folder / STAGING)


def _tables(known: Sequence[_Known], dataset: Dataset, requested: Manifest) -> Iterator[pa.Table]:
    """The rows of each shard of a job over all inputs."""
    for shard in requested.shards():
        yield _joined(known[i].source.rows(known[i].position, dataset.samples[i].image_id) for i in shard)


def _joined(parts: Iterable[pa.Table | None]) -> pa.Table:
    return pa.concat_tables([SCHEMA.empty_table(), *(part for part in parts if part is not None)]).combine_chunks()


def _failure(one: _Known, sample: Sample) -> Failure | None:
    failure = one.source.failures.get(one.source.ids[one.position])
    return failure and replace(failure, image_id=sample.image_id, path=str(sample.path))


def _left_over(
    dataset: Dataset, *, rows: pa.Table, main: _Source, gone: _Source | None, number: int
) -> list[tuple[_Source, int, int]]:
    """Results of images that are not among the inputs: their source, position in it, and in which generation they went."""
    ids, paths = {s.image_id for s in dataset.samples}, set(rows["path"].to_pylist())
    left: dict[str, tuple[_Source, int, int]] = {}
    for source in (gone, main) if gone else (main,):
        for i in sorted(source.finished):
            image_id = source.ids[i]
            taken = image_id in ids or source.paths[i] in paths
            if not taken and image_id not in source.failures:
                left[image_id] = (source, i, number if source is main else source.inputs["gone_in"][i])
    return list(left.values())


def _write_gone(target: Path, left: Sequence[tuple[_Source, int, int]], shard_size: int) -> None:
    target.mkdir()
    columns = {name: [source.inputs[name][i] for source, i, _ in left] for name in INPUT_SCHEMA.names}
    columns["gone_in"] = [number for *_, number in left]
    pq.write_table(pa.Table.from_pydict(columns, schema=GONE_SCHEMA), target / INPUTS, compression="zstd")
    places = range(0, len(left), shard_size)
    tables = (_joined(s.rows(i, s.ids[i]) for s, i, _ in left[start : start + shard_size]) for start in places)
    parquet.write_joined(tables, target / INSTANCES, parquet.SCHEMA)


def _with_generations(
    rows: pa.Table, known: Sequence[_Known], *, main: _Source, gone: _Source | None, number: int
) -> pa.Table:
    """The list of inputs with the generation in which each was scored, and fingerprints that were known before."""
    digests, generations = [], []
    for one, digest in zip(known, rows["digest"].to_pylist(), strict=True):
        earlier = one.source is main or one.source is gone
        generations.append(one.source.inputs["generation"][one.position] if earlier else number)
        digests.append(one.source.inputs["digest"][one.position] if digest == UNREADABLE else digest)
    for name, values in (("digest", digests), ("generation", generations)):
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))
    return rows


def _remove_pictures(folder: Path, image_ids: set[str]) -> None:
    for name, ending in PICTURES.items():
        for image_id in image_ids if (folder / name).is_dir() else ():
            (folder / name / f"{file_stem(image_id)}{ending}").unlink(missing_ok=True)


def _first(folder: Path, held: Manifest) -> Generation:
    at = datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, UTC)
    return Generation(number=1, at=at.isoformat(timespec="seconds"), images=held.images, new=held.images)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
