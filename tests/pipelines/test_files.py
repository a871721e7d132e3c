"""Files are whole or as they were, whatever happens while they are written."""

from __future__ import annotations

import os

import mlflow
import pytest

from models.errors import RegistryError
from pipelines import files
from pipelines.tracking.mlflow_runs import store_errors


@pytest.mark.parametrize("for_all", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_where_writing_fails(tmp_path, for_all, error):
    path = tmp_path / "folder" / "a.json"
    files.write_text(path, "old")
    with pytest.raises(type(error)), files.replacing(path, shared=for_all) as temporary:
        temporary.write_text("half")
        raise error
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    with files.replacing(path, shared=for_all) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_must_outlive_a_power_cut_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path, calls, real = tmp_path / "a", [], os.replace
    monkeypatch.setattr(files, "flush", lambda p: calls.append("folder" if p.is_dir() else "file"))
    monkeypatch.setattr(files.os, "replace", lambda *a: (calls.append("replace"), real(*a)))
    with files.replacing(path, durable=True) as temporary:
        temporary.write_text("x")
    assert calls == ["file", "replace", "folder"]
    calls.clear()
    files.write_bytes(path, b"y")
    assert calls == ["file", "replace", "folder"]
    calls.clear()
    files.write_text(path, "z")
    assert calls == ["replace"]


def test_processes_that_share_a_file_have_temporary_ones_of_their_own(tmp_path):
    path = tmp_path / "a"
    with files.replacing(path, shared=True) as first, files.replacing(path, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert path.stat().st_mode & 0o777 == 0o644
    # What a kill left is written over where the name is fixed.
    (tmp_path / ".a.tmp").write_text("left")
    files.write_text(path, "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_errors_of_the_store_are_one_line_and_keep_their_cause():
    cause = mlflow.MlflowException("refused\n" + "x" * 400)
    with (
        pytest.raises(RegistryError, match=r"^m/1: cannot be read \(refused x{292}\)$") as caught,
        store_errors("m/1: cannot be read"),
    ):
        raise cause
    assert caught.value.__cause__ is cause
    with pytest.raises(OSError, match="away"), store_errors("m/1: cannot be read"):
        raise OSError("away")
    with pytest.raises(RegistryError, match="away"), store_errors("m/1: cannot be read", OSError):
        raise OSError("away")
