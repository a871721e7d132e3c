"""What a row of a served request may be: never, unless whoever starts the server says so, a path."""

from __future__ import annotations

import base64
import os
import sys
import types

import mlflow
import pytest

from models.pyfunc import SERVERS, image_bytes, paths_allowed


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("PLANES_ALLOW_PATHS", raising=False)
    for name in SERVERS:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_takes_no_paths_unless_it_is_told_to(server, monkeypatch):
    assert paths_allowed()
    monkeypatch.setitem(sys.modules, server, types.ModuleType(server))
    assert not paths_allowed()
    monkeypatch.setenv("PLANES_ALLOW_PATHS", "1")
    assert paths_allowed()


def test_any_process_can_be_told_to_take_no_paths(monkeypatch):
    monkeypatch.setenv("PLANES_ALLOW_PATHS", "0")
    assert not paths_allowed()


def test_the_disk_is_not_looked_at_where_paths_are_not_allowed(tmp_path, monkeypatch):
    (tmp_path / "there.png").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    looked = []
    monkeypatch.setattr(os.path, "exists", lambda path: looked.append(path) or True)
    messages = []
    for path in ("there.png", "absent.png"):
        with pytest.raises(mlflow.MlflowException) as error:
            image_bytes(path, paths=False)
        messages.append(str(error.value).replace(path, "PATH"))
    assert len(set(messages)) == 1
    assert "this server takes no paths" in messages[0]
    assert looked == []


def test_bytes_base64_and_data_urls_are_understood(tmp_path):
    content = bytes(range(256))
    text = base64.b64encode(content).decode()
    for value in (content, text, f"data:image/png;base64,{text}"):
        assert image_bytes(value, paths=False) == content
    (tmp_path / "a.png").write_bytes(content)
    assert image_bytes(str(tmp_path / "a.png"), paths=True) == str(tmp_path / "a.png")
    for odd in ("http://127.0.0.1/a.png", "file:///etc/passwd", "s3://bucket/a.png", ""):
        if odd:
            with pytest.raises(mlflow.MlflowException, match="not a base64-encoded image file"):
                image_bytes(odd, paths=True)
