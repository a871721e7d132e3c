"""The page about Python: its example runs as it stands, prints what it says, and leaves MLflow's address alone."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import shutil

import mlflow
import pytest

from pipelines.use_cases.display import Display

pytestmark = pytest.mark.xdist_group("versions")


@pytest.fixture(scope="module")
def page(root):
    """The page's text."""
    return (root / "docs" / "python.md").read_text()


def test_its_example_runs_as_it_stands(page, airfield, tmp_path, monkeypatch, capsys):
    shutil.copytree(airfield, tmp_path / "data" / "airfield")
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    out = io.StringIO()
    capsys.readouterr()
    names: dict = {}
    with contextlib.redirect_stdout(out):
        exec(compile(example, "docs/python.md", "exec"), names)
    lines = out.getvalue().splitlines()
    # Nothing but what the example prints itself.
    assert len(lines) == 5, lines
    assert all(line.startswith("['images 0 of 2 (none trained on required)', ") for line in lines[:2])
    assert re.fullmatch(r"planes-unet/2 0\.\d+ predictions/planes-unet-2", lines[2])
    assert lines[3] == "planes-unet/1"
    assert lines[4] == str([("force", "1", "committed"), ("force", "2", "committed"), ("rollback", "1", "committed")])
    assert (tmp_path / "predictions" / "planes-unet-2" / "instances.parquet").exists()
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert not mlflow.is_tracking_uri_set()


def test_what_it_names_is_there(page):
    for path in re.findall(r"^\| `((?:pipelines|scoring)\.[\w.]+)` \|", page, re.M):
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name)), path


def test_what_happens_is_logged_and_shown(project, caplog, tmp_path, monkeypatch):
    from pipelines.registry.model_versions import Registry
    from scoring.requests import ScoreRequest
    from scoring.use_cases import score

    monkeypatch.chdir(tmp_path)
    shown = []

    def items(sequence, total, title):
        shown.append((title, total))
        return sequence

    registry = Registry(project.client)
    request = ScoreRequest(models=("planes-det/1",), data=str(project.data))
    with caplog.at_level(logging.INFO, "scoring"):
        (job,) = score(registry, request, Display(items=items))
    assert shown == [("scoring with planes-det/1", 2)]
    assert f"planes in {job.images} images" in caplog.text
    assert (tmp_path / "predictions" / "planes-det-1" / "instances.parquet").exists()
