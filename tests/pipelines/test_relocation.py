"""A store follows its artefacts where they were moved with it, and leaves alone what lies elsewhere for the moment."""

from __future__ import annotations

import shutil
import sqlite3

import pytest

from pipelines.tracking.moved_store import COLUMNS, follow_move

ROWS = {
    "experiments.artifact_location": ["1", "2"],
    "runs.artifact_uri": ["1/run/artifacts", "1/empty/artifacts"],
    "logged_models.artifact_location": ["1/models/m-a/artifacts", "1/models/m-b/artifacts"],
    "model_versions.storage_location": ["1/models/m-a/artifacts"],
    "model_versions.source": [],
}
LYING = ("1/run/artifacts", "1/models/m-a/artifacts", "1/models/m-b/artifacts")


@pytest.fixture
def store(tmp_path):
    """A store beside an empty ``mlruns``; its artefacts are on another disk."""
    disk = tmp_path / "disk" / "mlruns"
    for place in LYING:
        (disk / place).mkdir(parents=True)
        (disk / place / "file").write_text(place)
    (tmp_path / "here" / "mlruns").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "here" / "mlflow.db") as connection:
        for table in dict.fromkeys(t for t, _ in COLUMNS):
            columns = [c for t, c in COLUMNS if t == table]
            connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, {', '.join(columns)})")
            for column in columns:
                for place in ROWS[f"{table}.{column}"]:
                    connection.execute(f"INSERT INTO {table} ({column}) VALUES (?)", (f"{disk}/{place}",))
    return tmp_path / "here" / "mlflow.db"


def _places(store):
    with sqlite3.connect(store) as connection:
        return sorted(r[0] for t, c in COLUMNS for r in connection.execute(f"SELECT {c} FROM {t}") if r[0])


def test_a_disk_that_is_away_for_one_call_changes_nothing(store, tmp_path):
    before = _places(store)
    (tmp_path / "disk").rename(tmp_path / "away")
    assert follow_move(store) == []
    assert _places(store) == before
    # Nor does it where some of its artefacts were copied here.
    shutil.copytree(tmp_path / "away" / "mlruns" / LYING[0], store.parent / "mlruns" / LYING[0])
    follow_move(store)
    changed = set(_places(store)) - set(before)
    assert changed == {f"{store.parent}/mlruns/{LYING[0]}"} | {f"{store.parent}/mlruns/1"}
    (tmp_path / "away").rename(tmp_path / "disk")
    assert follow_move(store) == []
    assert str(tmp_path / "disk" / "mlruns" / LYING[1]) in _places(store)


def test_places_follow_where_the_artefacts_came_along(store, tmp_path):
    shutil.rmtree(store.parent / "mlruns")
    (tmp_path / "disk" / "mlruns").rename(store.parent / "mlruns")
    assert follow_move(store) == [f"{tmp_path}/disk/mlruns"]
    # A run without artefacts, and an experiment without any, keep their places.
    left = [place for place in _places(store) if not place.startswith(f"{store.parent}/mlruns/")]
    assert left == [f"{tmp_path}/disk/mlruns/1/empty/artifacts", f"{tmp_path}/disk/mlruns/2"]
    assert follow_move(store) == []


def test_runs_of_a_disk_that_is_away_stay_although_the_models_came_along(store, tmp_path):
    shutil.copytree(tmp_path / "disk" / "mlruns" / "1" / "models", store.parent / "mlruns" / "1" / "models")
    (tmp_path / "disk").rename(tmp_path / "away")
    follow_move(store)
    assert f"{tmp_path}/disk/mlruns/{LYING[0]}" in _places(store)


def test_a_store_that_may_not_be_written_is_left_as_it_is(store, tmp_path, monkeypatch):
    before = _places(store)
    shutil.rmtree(store.parent / "mlruns")
    (tmp_path / "disk" / "mlruns").rename(store.parent / "mlruns")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert follow_move(store) == []
    assert _places(store) == before


def test_a_copy_beside_its_original_stays_as_it_is(store, tmp_path):
    shutil.rmtree(store.parent / "mlruns")
    shutil.copytree(tmp_path / "disk" / "mlruns", store.parent / "mlruns")
    before = _places(store)
    assert follow_move(store) == []
    assert _places(store) == before
