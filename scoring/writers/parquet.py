"""The instance table as parquet, the first output; and the table of images that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataError, one_line
from models.geometry.rle import checked_rle
from models.instances import Instances, from_rows
from models.saved.scores import Scores
from pipelines.instance_table import SCHEMA, write_instances, write_table
from scoring.reader import Failure

__all__ = ["SCHEMA", "write_instances"]

PROBABILITY = "probability"
ERROR_SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "path", "kind", "message")])


def read_instances(path: Path) -> list[Instances]:
    """Read an instance table back.

    Raises:
        DataError: absent, damaged, or not an instance table.
    """
    with _opened(path) as file:
        return _read(path, file.read)


class InstanceTable:
    """A job's instance table, read anew a row group at a time whenever it is iterated: memory holds one shard.

    Raises (when iterated):
        DataError: absent, damaged, or not an instance table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Row groups whose masks have been checked; the first iteration pays for it.
        self._checked: set[int] = set()

    def __iter__(self) -> Iterator[Instances]:
        with _opened(self.path) as file:
            for group in range(file.num_row_groups):
                predictions = _read(self.path, partial(file.read_row_group, group), group not in self._checked)
                self._checked.add(group)
                yield from predictions


def _read(path: Path, read: Callable[[], pa.Table], check: bool = True) -> list[Instances]:
    """Rows of an instance table; masks are checked, since runs that end early decode to random memory."""
    try:
        rows = read().to_pylist()
        if check:
            _check_masks(path, rows)
        predictions = from_rows(rows)
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{path}: its rows cannot be read ({one_line(error, 160)})") from error
    if sum(row["mask_counts"] is not None for row in rows) != sum(len(one.masks or ()) for one in predictions):
        raise DataError(f"{path}: some planes of an image have masks and others have none; score it anew")
    return predictions


def _check_masks(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if row["mask_counts"] is None:
            continue
        try:
            checked_rle({"size": row["mask_size"], "counts": row["mask_counts"]}, row["height"], row["width"])
        except ValueError as error:
            where = f"image {row['image_id']!r}, mask {row['instance']}"
            raise DataError(f"{path}: {where}: {error}; score it anew") from error


def join_tables(tables: Sequence[Path], path: Path, schema: pa.Schema, scores: Scores | None = None) -> None:
    """Write the rows of several files into one; see `write_joined`."""
    write_joined((pq.read_table(source, schema=schema, partitioning=None) for source in tables), path, schema, scores)


def write_joined(tables: Iterable[pa.Table], path: Path, schema: pa.Schema, scores: Scores | None = None) -> int:
    """Write tables of one schema into one file, a row group each; return how many rows they have.

    Args:
        scores: of the version; with them the column ``probability`` is added, float32: that of being correct.
    """
    joined = schema if scores is None else schema.append(pa.field(PROBABILITY, pa.float32()))
    count = 0
    with pq.ParquetWriter(path, joined, compression="zstd") as writer:
        for table in tables:
            if scores is not None:
                probability = scores.probability(table["score"].to_numpy())
                table = table.append_column(PROBABILITY, pa.array(probability, pa.float32()))
            # The rows of an image must stay in one group.
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            count += table.num_rows
    return count


def failure_table(failures: Sequence[Failure]) -> pa.Table:
    """Images that could not be scored, as rows."""
    return pa.Table.from_pylist([f.__dict__ for f in failures], schema=ERROR_SCHEMA)


def write_failures(failures: Sequence[Failure], path: Path) -> None:
    """Write image_id, path, kind and message of the images that could not be scored."""
    write_table(failure_table(failures), path)


def read_failures(path: Path) -> list[Failure]:
    """Read back the images that could not be scored."""
    return [Failure(**row) for row in pq.read_table(path, partitioning=None).to_pylist()]


def _opened(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({one_line(error, 160)})") from error
    missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{path}: not an instance table (no column {missing[0]!r})")
    return file
