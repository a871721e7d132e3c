"""A SQLite store that was moved with its artefacts: MLflow wrote absolute paths into it, which are put right here."""

from __future__ import annotations

import os
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

    A place is changed where its root is gone and that very artefact lies beneath the ``mlruns`` beside the
    store: a copy whose original still exists is left as it is, and so is what lies on a disk that is away
    for the moment. A run without artefacts keeps its place; where an experiment's new ones go follows those that
    it has. A store that may not be written is left as it is.
    All of it in one transaction.
    """
    here = store.resolve().parent
    if not store.is_file() or not (here / ARTEFACTS).is_dir():
        return []
    if not os.access(store, os.W_OK):
        return []
    with closing(sqlite3.connect(store, timeout=60)) as connection, connection:
        columns = [c for c in COLUMNS if _has(connection, *c)]
        moved: dict[str, list[tuple[str, str, str]]] = {}
        for table, column in columns:
            for place in _places(connection, table, column):
                root = place[: place.index(f"/{ARTEFACTS}/") + len(ARTEFACTS) + 1]
                if _left(root, here):
                    moved.setdefault(root, []).append((table, column, place))
        followed = []
        for root, places in sorted(moved.items()):
            existing = [(t, c, p) for t, c, p in places if Path(_beneath(here, root, p)).exists()]
            if not existing:
                continue
            followed.append(root.removeprefix("file://"))
            for table, column, place in places:
                # Where an experiment's artefacts go follows those that it has.
                mine = table == "experiments" and any(p.startswith(f"{place}/") for _, _, p in existing)
                if mine or (table, column, place) in existing:
                    new = _beneath(here, root, place)
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (new, place))
    return followed


def _beneath(here: Path, root: str, place: str) -> str:
    """Where a place below ``root`` is below the ``mlruns`` beside the store."""
    return f"{here}/{ARTEFACTS}{place[len(root) :]}"


def _has(connection: sqlite3.Connection, table: str, column: str) -> bool:
    return any(row[1] == column for row in connection.execute(f"PRAGMA table_info({table})"))


def _places(connection: sqlite3.Connection, table: str, column: str) -> list[str]:
    """The local places below some ``.../mlruns`` that a column holds."""
    rows = connection.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE '%/{ARTEFACTS}/%'")
    return [place for (place,) in rows if place.startswith(("/", "file:///")) and f"/{ARTEFACTS}/" in place]


def _left(root: str, here: Path) -> bool:
    folder = Path(root.removeprefix("file://"))
    return folder != here / ARTEFACTS and not folder.exists()
