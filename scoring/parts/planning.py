"""From a listing to a plan: paths are listed in pieces, sorted and named on disk, and cut into parts.

What a kill leaves is gone on with: pieces that are listed, where the listing resumes, and parts that are there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataError, EngineMissing, OutputError, one_line
from pipelines.data.readers.listing import Listing
from pipelines.data.readers.opening import check_names
from pipelines.data.remote import UNREADABLE, fingerprints, to_path
from pipelines.files import replacing, write_text
from scoring.parts.plan import SCHEMA, file_of

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

# Paths of a piece, which are in memory together.
PIECE = 100_000
# What sorting may take of the memory; more of it is on disk meanwhile.
MEMORY = "256MB"
LISTED, PARTS, REMOVED, COMPLETE = "listed", "parts", "removed", "complete"
PIECE_SCHEMA = pa.schema([("row", pa.int64()), ("path", pa.string()), ("stem", pa.string()), ("mark", pa.string())])
# Of the images that a part loses: whether they are gone, or scored anew in another part.
REMOVED_SCHEMA = pa.schema([("image_id", pa.string()), ("gone", pa.bool_())])


@dataclass(frozen=True)
class Listed:
    """A list of images, cut into parts.

    Attributes:
        folder: with a file for each part.
        images: how many there are.
        at: when the last one was listed, ISO 8601.
        digest: of names and paths in their order, 16 hex digits.
    """

    folder: Path
    images: int
    at: str
    digest: str


@dataclass(frozen=True)
class Changes:
    """What a list has that a job has not, cut into parts, and what it has no more.

    Attributes:
        listed: the images that are to be scored; ``listed.images`` may be 0.
        removed: folder with a file for each part of the job that loses images, as REMOVED_SCHEMA.
        losing: numbers of those parts.
        digest: of what is removed, 16 hex digits.
        total: images of the whole list.
        new: of them, not known to the job.
        changed: whose file, or name, was another one.
        unreadable: files that cannot be looked at now; they count as unchanged.
        gone: images of the job that are not in the list.
    """

    listed: Listed
    removed: Path
    losing: tuple[int, ...]
    digest: str
    total: int
    new: int
    changed: int
    unreadable: int
    gone: int


def plan_images(listing: Listing, staging: Path, part_size: int) -> Listed:
    """List, sort and name images, and write them down part by part; memory holds a piece.

    An image is named as `open_dataset` names it: by its file without the ending, and by its path below the folder of
    all where several files share that.

    Args:
        staging: folder to work in; what an earlier call left there of the same listing is used. A list that is another
            file by now is another listing.

    Raises:
        DataError: no images, one of them twice, or names that are not unique.
        EngineMissing: DuckDB is not installed.
        OutputError: the folder cannot be written, a file of it is damaged, or the disk is full.
    """
    with _told(listing, staging):
        origin = f"{listing.where}\n{listing.mark}\n{part_size}\n{PIECE_SCHEMA.names}\n"
        if not (staging / "of").exists() or (staging / "of").read_text() != origin:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            write_text(staging / "of", origin)
        _list(listing, staging / LISTED)
        with _named(listing, staging) as database:
            rows = _stream(database, f"SELECT image_id, path FROM named ORDER BY {_order(listing)}")
            images, digest = _cut(rows, staging / PARTS, part_size)
        return Listed(staging / PARTS, images, (staging / LISTED / COMPLETE).read_text(), digest)


def plan_changes(listing: Listing, staging: Path, held: Sequence[Path], *, part_size: int, first: int) -> Changes:
    """List images and find what a job has not scored of them, or otherwise than they are now; memory holds a piece.

    An image is unchanged where its path, its name and the fingerprint of its file are those that the job has.

    Args:
        staging: folder to work in, an empty one: another night's list is not to be gone on with.
        held: lists of the job's images, a file for each part, named as parts are.
        first: number of the first new part.

    Raises:
        DataError: as `plan_images`.
        EngineMissing: DuckDB is not installed.
    """
    with _told(listing, staging):
        _list(listing, staging / LISTED, marked=True)
    with _told(listing, staging), _named(listing, staging) as database:
        database.execute("CREATE TABLE held (image_id VARCHAR, path VARCHAR, digest VARCHAR, part INTEGER)")
        if held:
            part = r"CAST(regexp_extract(filename, 'part-(\d+)\.[a-z]+$', 1) AS INTEGER)"
            source = f"read_parquet([{_quoted(held)}], filename = true, hive_partitioning = false)"
            database.execute(f"INSERT INTO held SELECT image_id, path, digest, {part} FROM {source}")
        database.execute(
            "CREATE TABLE pending AS SELECT n.image_id, n.path, n.row, h.path IS NOT NULL AS known FROM named n "
            "LEFT JOIN held h ON h.path = n.path WHERE h.path IS NULL OR h.image_id <> n.image_id "
            f"OR (h.digest <> n.mark AND n.mark <> '{UNREADABLE}')"
        )
        database.execute(
            "CREATE TABLE removed AS SELECT h.part, h.image_id, n.path IS NULL AS gone FROM held h "
            "LEFT JOIN named n ON n.path = h.path LEFT JOIN pending p ON p.path = h.path "
            "WHERE n.path IS NULL OR p.path IS NOT NULL"
        )
        rows = _stream(database, f"SELECT image_id, path FROM pending ORDER BY {_order(listing)}")
        images, digest = _cut(rows, staging / PARTS, part_size, first)
        losing, lost = _cut_removed(
            _stream(database, "SELECT part, image_id, gone FROM removed ORDER BY part, image_id"), staging / REMOVED
        )

        def rows_of(query: str) -> int:
            return int(database.sql(f"SELECT count(*) FROM {query}").fetchall()[0][0])

        changed, at = rows_of("pending WHERE known"), (staging / LISTED / COMPLETE).read_text()
        away = f"named n JOIN held h ON h.path = n.path WHERE n.mark = '{UNREADABLE}' AND h.digest <> n.mark"
        return Changes(
            Listed(staging / PARTS, images, at, digest),
            staging / REMOVED,
            losing,
            lost,
            total=rows_of("named"),
            new=images - changed,
            changed=changed,
            unreadable=rows_of(away),
            gone=rows_of("removed WHERE gone"),
        )


def _list(listing: Listing, folder: Path, *, marked: bool = False) -> None:
    """Write down what is listed, a piece a file; ``marked``: with the fingerprint of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / COMPLETE).exists():
        return
    pieces = sorted(folder.glob("*.parquet"))
    if not listing.resumes:
        for piece in pieces:
            piece.unlink()
        pieces = []
    done = sum(pq.read_metadata(piece).num_rows for piece in pieces)
    last = pq.read_table(pieces[-1], partitioning=None, columns=["path"])["path"][-1].as_py() if pieces else ""
    if done:
        log.info(f"{listing.where}: {done:,} paths were listed before")
    entries = listing.stream(done, last)
    for number in count(len(pieces)):
        some = list(islice(entries, PIECE))
        if not some:
            break
        batch, marks = [entry.path for entry in some], [entry.mark for entry in some]
        check_names(batch, listing.where)
        if marked and not all(marks):
            marks = fingerprints([to_path(path) for path in batch])
        stems = [os.path.splitext(path.rsplit("/", 1)[-1])[0] for path in batch]
        table = pa.table([list(range(done, done + len(batch))), batch, stems, marks], schema=PIECE_SCHEMA)
        with replacing(folder / f"{number:06d}.parquet", durable=True) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        done += len(batch)
        if number % 10 == 9:
            log.info(f"{listing.where}: {done:,} paths listed")
    write_text(folder / COMPLETE, datetime.now(UTC).isoformat(timespec="seconds"))


def _order(listing: Listing) -> str:
    return "path" if listing.sort else "row"


def _quoted(files: Sequence[Path]) -> str:
    return ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)


@contextmanager
def _named(listing: Listing, staging: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with the view ``named`` of what is listed: image_id, path, mark and row."""
    pieces = sorted((staging / LISTED).glob("*.parquet"))
    if not pieces:
        raise DataError(f"{listing.where}: no images there (PNG, JPEG, TIFF, BMP, WebP)")
    with _database(staging / "sorting") as database:
        database.execute(
            f"CREATE VIEW listed AS SELECT * FROM read_parquet([{_quoted(pieces)}], hive_partitioning = false)"
        )
        query = "SELECT path, count(*) FROM listed GROUP BY path HAVING count(*) > 1 LIMIT 1"
        for path, times in database.sql(query).fetchall():
            raise DataError(f"{listing.where}: image {path!r} appears {times} times; image names must be unique")
        database.execute("CREATE TABLE shared AS SELECT stem FROM listed GROUP BY stem HAVING count(*) > 1")
        _name_shared(database, listing.where)
        database.execute(
            "CREATE VIEW named AS SELECT coalesce(renamed.image_id, stem) AS image_id, listed.path, mark, row FROM listed "
            "LEFT JOIN renamed ON renamed.path = listed.path"
        )
        yield database


def _stream(database: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.RecordBatch]:
    """The rows of a query, a piece in memory at a time."""
    return iter(database.sql(query).to_arrow_reader(PIECE))


def _name_shared(database: duckdb.DuckDBPyConnection, where: str) -> None:
    """Make the table ``renamed`` of the images whose name others have too: path and image_id."""
    database.execute("CREATE TABLE renamed (path VARCHAR, image_id VARCHAR)")
    if not database.sql("SELECT 1 FROM shared LIMIT 1").fetchall():
        return
    common: str | None = None
    for batch in _stream(database, "SELECT path FROM listed"):
        for folder in {path.rpartition("/")[0] for path in batch["path"].to_pylist()}:
            common = _absolute(folder) if common is None else _common(common, _absolute(folder))
    assert common is not None
    # Another connection: what is asked of one ends the stream of what was asked before.
    writer = database.cursor()
    for batch in _stream(database, "SELECT path FROM listed WHERE stem IN (SELECT stem FROM shared)"):
        paths = batch["path"].to_pylist()
        named = pa.table({"path": paths, "image_id": [_below(path, common) for path in paths]})
        writer.register("named", named)
        writer.execute("INSERT INTO renamed SELECT * FROM named")
        writer.unregister("named")
    query = (
        "SELECT image_id, count(*) FROM (SELECT image_id FROM renamed UNION ALL SELECT stem FROM listed "
        "WHERE stem IN (SELECT image_id FROM renamed) AND stem NOT IN (SELECT stem FROM shared)) "
        "GROUP BY image_id HAVING count(*) > 1 LIMIT 1"
    )
    for image_id, times in database.sql(query).fetchall():
        raise DataError(f"{where}: image {image_id!r} appears {times} times; image names must be unique")


def _absolute(folder: str) -> str:
    return folder if "://" in folder else os.path.abspath(folder)


def _common(first: str, second: str) -> str:
    try:
        return os.path.commonpath([first, second])
    except ValueError:
        # A URL and a path.
        return "/"


def _below(path: str, common: str) -> str:
    return Path(os.path.relpath(_absolute(path), common)).as_posix()


def _cut(rows: Iterator[pa.RecordBatch], folder: Path, part_size: int, first: int = 0) -> tuple[int, str]:
    """Write the parts; return how many images they hold, and the digest of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    digest, images, number = hashlib.sha256(), 0, first
    waiting = SCHEMA.empty_table()
    for batch in rows:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch]).cast(SCHEMA)])
        for name, path in zip(batch["image_id"].to_pylist(), batch["path"].to_pylist(), strict=True):
            digest.update(f"{name}\0{path}\0".encode())
        while waiting.num_rows >= part_size:
            _write_part(waiting.slice(0, part_size), folder, number)
            waiting, number, images = waiting.slice(part_size).combine_chunks(), number + 1, images + part_size
    if waiting.num_rows:
        _write_part(waiting, folder, number)
        images += waiting.num_rows
    return images, digest.hexdigest()[:16]


def _cut_removed(rows: Iterator[pa.RecordBatch], folder: Path) -> tuple[tuple[int, ...], str]:
    """Write what each part loses; return the numbers of these parts, and the digest of all."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    digest, numbers = hashlib.sha256(), []
    pending = (row for batch in rows for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))
    for number, group in groupby(pending, key=itemgetter(0)):
        columns = list(zip(*group, strict=True))[1:]
        table = pa.table([pa.array(column) for column in columns], schema=REMOVED_SCHEMA)
        _write_part(table, folder, number)
        digest.update(f"{number}\0{columns}".encode())
        numbers.append(number)
    return tuple(numbers), digest.hexdigest()[:16]


def _write_part(table: pa.Table, folder: Path, number: int) -> None:
    pq.write_table(table, folder / file_of(number), compression="zstd")


@contextmanager
def _told(listing: Listing, staging: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # DuckDB's errors have their own root, and it is imported on use.
        if not isinstance(error, OSError) and "duckdb" not in type(error).__module__:
            raise
        raise OutputError(
            f"{listing.where}: cannot be listed and sorted in {staging} ({one_line(error, 300)}); call again"
        ) from error


def _database(folder: Path) -> duckdb.DuckDBPyConnection:
    try:
        import duckdb
    except ImportError as error:
        raise EngineMissing("jobs in parts: DuckDB is not installed; pip install duckdb") from error
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    database = duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": str(folder), "threads": 2})
    # Its own bar would go to the standard output.
    database.execute("SET enable_progress_bar = false")
    return database
