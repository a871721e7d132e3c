"""From a listing to a plan: paths are listed in pieces, sorted and named on disk, and cut into parts.

What a kill leaves is gone on with: pieces that are listed, where the listing resumes, and parts that are there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataError, EngineMissing
from pipelines.data.readers.listing import Listing
from pipelines.data.readers.opening import check_names
from pipelines.files import replacing, write_text
from scoring.parts.plan import SCHEMA, file_of

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

# Paths of a piece, which are in memory together.
PIECE = 100_000
# What sorting may take of the memory; more of it is on disk meanwhile.
MEMORY = "256MB"
LISTED, PARTS, COMPLETE = "listed", "parts", "complete"
PIECE_SCHEMA = pa.schema([("row", pa.int64()), ("path", pa.string()), ("stem", pa.string())])


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
    """
    origin = f"{listing.where}\n{listing.mark}\n{part_size}\n"
    if not (staging / "of").exists() or (staging / "of").read_text() != origin:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_text(staging / "of", origin)
    _list(listing, staging / LISTED)
    return _arrange(listing, staging, part_size)


def _list(listing: Listing, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if (folder / COMPLETE).exists():
        return
    pieces = sorted(folder.glob("*.parquet"))
    if not listing.resumes:
        for piece in pieces:
            piece.unlink()
        pieces = []
    done = sum(pq.read_metadata(piece).num_rows for piece in pieces)
    last = pq.read_table(pieces[-1], columns=["path"])["path"][-1].as_py() if pieces else ""
    if done:
        log.info(f"{listing.where}: {done:,} paths were listed before")
    paths = listing.stream(done, last)
    for number in count(len(pieces)):
        batch = list(islice(paths, PIECE))
        if not batch:
            break
        check_names(batch, listing.where)
        stems = [os.path.splitext(path.rsplit("/", 1)[-1])[0] for path in batch]
        table = pa.table([list(range(done, done + len(batch))), batch, stems], schema=PIECE_SCHEMA)
        with replacing(folder / f"{number:06d}.parquet", durable=True) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        done += len(batch)
        if number % 10 == 9:
            log.info(f"{listing.where}: {done:,} paths listed")
    write_text(folder / COMPLETE, datetime.now(UTC).isoformat(timespec="seconds"))


def _arrange(listing: Listing, staging: Path, part_size: int) -> Listed:
    """Sort, name and cut what is listed."""
    pieces = sorted((staging / LISTED).glob("*.parquet"))
    if not pieces:
        raise DataError(f"{listing.where}: no images there (PNG, JPEG, TIFF, BMP, WebP)")
    order = "path" if listing.sort else "row"
    with _database(staging / "sorting") as database:
        files = ", ".join("'" + str(piece).replace("'", "''") + "'" for piece in pieces)
        database.execute(f"CREATE VIEW listed AS SELECT * FROM read_parquet([{files}])")
        query = "SELECT path, count(*) FROM listed GROUP BY path HAVING count(*) > 1 LIMIT 1"
        for path, times in database.sql(query).fetchall():
            raise DataError(f"{listing.where}: image {path!r} appears {times} times; image names must be unique")
        database.execute("CREATE TABLE shared AS SELECT stem FROM listed GROUP BY stem HAVING count(*) > 1")
        _name_shared(database, listing.where)
        query = (
            "SELECT coalesce(renamed.image_id, stem) AS image_id, listed.path FROM listed "
            f"LEFT JOIN renamed ON renamed.path = listed.path ORDER BY listed.{order}"
        )
        images, digest = _cut(_stream(database, query), staging / PARTS, part_size)
    return Listed(staging / PARTS, images, (staging / LISTED / COMPLETE).read_text(), digest)


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


def _cut(rows: Iterator[pa.RecordBatch], folder: Path, part_size: int) -> tuple[int, str]:
    """Write the parts; return how many images they hold, and the digest of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    digest, images, number = hashlib.sha256(), 0, 0
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


def _write_part(table: pa.Table, folder: Path, number: int) -> None:
    pq.write_table(table, folder / file_of(number), compression="zstd")


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
