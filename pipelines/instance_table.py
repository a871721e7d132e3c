"""The instance table: one row per detected plane, as parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.instances import Instances, to_rows
from pipelines.files import replacing

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("instance", pa.int32()),
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("x2", pa.float32()),
        ("y2", pa.float32()),
        ("score", pa.float32()),
        ("label", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask_size", pa.list_(pa.int32())),
        ("mask_counts", pa.string()),
    ]
)


def write_instances(predictions: Iterable[Instances], path: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write the instance table, whole or not at all; images without planes have no row.

    Args:
        more: columns that hold one value, text or number, in all rows.
    """
    table = pa.Table.from_pylist(to_rows(predictions), schema=SCHEMA)
    for name, value in (more or {}).items():
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.scalar(value).type))
    write_table(table, path)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as parquet, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
