"""A project folder that is moved, with its SQLite store, still scores from its registry."""

from __future__ import annotations

import shutil
import sqlite3

import pytest

from tests.journeys.conftest import Project, error_line

pytestmark = pytest.mark.xdist_group("versions")


def _places(folder):
    from pipelines.tracking.moved_store import COLUMNS

    with sqlite3.connect(folder / "mlflow.db") as connection:
        return {
            row[0] for table, column in COLUMNS for row in connection.execute(f"SELECT {column} FROM {table}") if row[0]
        }


def test_scoring_promotion_and_training_runs_go_on_elsewhere(project, tmp_path):
    first = Project(tmp_path / "it's here" / "planes", project.data)
    first.folder.mkdir(parents=True)
    saved = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    first.register(saved, "planes-det")
    first.step("promote", "--model", "planes-det/1", "--data", str(project.data), "--minimum", "-1")
    score = ("--model", "planes-det/production", "--data", str(project.data), "--overlays", "0", "--out")
    first.score(*score, str(tmp_path / "before"))

    second = Project(tmp_path / "moved_%_there", project.data)
    shutil.move(first.folder, second.folder)
    done = second.score(*score, str(tmp_path / "after"), real=True)
    assert "was moved here from" in done.stderr
    tables = [(tmp_path / name / "planes-det-1" / "instances.parquet").read_bytes() for name in ("before", "after")]
    assert tables[0] == tables[1]
    assert not first.folder.exists()
    # But for runs without artefacts.
    left = [p for p in _places(second.folder) if not p.startswith((str(second.folder), "models:/"))]
    assert not [p for p in left if (second.folder / p.removeprefix(f"{first.folder}/")).exists()], left
    again = second.score(*score, str(tmp_path / "again"))
    assert "was moved" not in again.stderr
    assert "ok" in second.registry("verify", "planes-det").stdout

    # A copy beside its original is another matter: both stay as they are.
    third = Project(tmp_path / "copy", project.data)
    shutil.copytree(second.folder, third.folder)
    third.registry("list")
    assert _places(third.folder) == _places(second.folder)
    # Without its artefacts a store has nothing to go by.
    shutil.rmtree(second.folder)
    shutil.rmtree(third.folder / "mlruns")
    assert "planes-det" in error_line(third.score(*score, str(tmp_path / "none"), code=1))
