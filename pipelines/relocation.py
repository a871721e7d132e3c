"""A SQLite store that was moved with its artefacts: MLflow wrote absolute paths into it, which are put right here."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

ARTEFACTS = "mlruns"

# Where MLflow's schema keeps places of artefacts.
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)


def follow_move(store: Path) -> list[str]:
    """Point a moved store to the ``mlruns`` beside it; return the folders that it pointed to before.

    Only places are changed that are gone while ``mlruns/...`` lies beside the store: a
    copy whose original still exists is left as it is. All of it in one transaction.
    """
    here = store.resolve().parent
    if not store.is_file() or not (here / ARTEFACTS).is_dir():
        return []
    with closing(sqlite3.connect(store, timeout=60)) as connection, connection:
        columns = [c for c in COLUMNS if _has(connection, *c)]
        gone = sorted(
            {root for table, column in columns for root in _roots(connection, table, column) if _left(root, here)}
        )
        for root in gone:
            for table, column in columns:
                # By position, not by pattern: a folder's name may hold anything.
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (f"{here}/{ARTEFACTS}", len(root) + 1, len(root), root),
                )
    return [root.removeprefix("file://") for root in gone]


def _has(connection: sqlite3.Connection, table: str, column: str) -> bool:
    return any(row[1] == column for row in connection.execute(f"PRAGMA table_info({table})"))


def _roots(connection: sqlite3.Connection, table: str, column: str) -> set[str]:
    """The ``.../mlruns`` folders that local places in a column begin with."""
    found = set()
    for (place,) in connection.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE '%/{ARTEFACTS}/%'"):
        if place.startswith(("/", "file:///")):
            found.add(place[: place.index(f"/{ARTEFACTS}/") + len(ARTEFACTS) + 1])
    return found


def _left(root: str, here: Path) -> bool:
    folder = Path(root.removeprefix("file://"))
    return folder != here / ARTEFACTS and not folder.exists()
