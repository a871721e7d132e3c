"""`planes doctor`: what is there, what is missing and what to do; `planes` as one name for all commands."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
from click.testing import CliRunner

from pipelines.steps import doctor as command
from pipelines.use_cases import doctor
from scoring.planes import COMMANDS, main
from tests.stores import new_store


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(doctor, "LEAST_FREE", 0)
    return tmp_path


def _checks():
    return {one.name: one for one in doctor.examine()}


def test_this_environment_is_well(here):
    done = CliRunner().invoke(command.main, [])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert all(line[:4] in ("ok  ", "--  ") for line in lines)
    assert any(line.startswith("ok  PyTorch") for line in lines)
    # Looking makes no store.
    assert list(here.iterdir()) == []
    listed = json.loads(CliRunner().invoke(command.main, ["--json"]).stdout)
    assert (listed["exit_code"], listed["error"]) == (0, None)
    assert {"state", "name", "found", "remedy"} == set(listed["checks"][0])
    assert [one["name"] for one in listed["checks"]] == list(_checks())


def test_versions_that_are_not_of_one_release(here, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.11.0", "torchvision": "0.25.0"}.get(name, real(name)))
    assert _checks()["PyTorch"].state == "problem"
    done = CliRunner().invoke(command.main, [])
    assert done.exit_code == 1
    assert "!!  PyTorch" in done.output
    assert "they are not of one release; pip install -r requirements.txt" in done.output
    monkeypatch.setattr(
        doctor, "_version", lambda name: {"torch": "2.10.0+cpu", "torchvision": "0.25.0"}.get(name, real(name))
    )
    assert _checks()["PyTorch"].state == "ok"
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "odd", "torchvision": "0.25.0"}.get(name, real(name)))
    assert _checks()["PyTorch"].state == "problem"


def test_what_is_missing_is_named_with_its_remedy(here, monkeypatch):
    real = doctor._version
    absent = {"timm", "ray", "opencv-python", "opencv-python-headless", "torchvision"}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in absent else real(name))
    checks = _checks()
    assert checks["packages"].state == "problem"
    assert checks["packages"].found == "not installed: timm, opencv-python"
    assert (checks["ray"].state, checks["ray"].remedy) == ("optional", 'pip install "ray[data]"')
    assert checks["PyTorch"].found == "torchvision is not installed"
    # A scorer's environment is well as it is.
    absent |= {"torch", "mlflow", "segmentation-models-pytorch"}
    absent -= {"opencv-python"}
    checks = _checks()
    assert (checks["PyTorch"].state, checks["packages"].state) == ("optional", "ok")


def test_gpus_are_named_with_their_memory(here, monkeypatch):
    cuda = pytest.importorskip("torch").cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "mem_get_info", lambda number: (60e9 + number * 1e9, 80e9))
    monkeypatch.setattr(cuda, "get_device_name", lambda number: f"Card {number}")
    checks = _checks()
    assert checks["GPU 1"].found == "Card 1, 61 of 80 GB free"
    assert {checks[f"GPU {n}"].state for n in (0, 1)} == {"ok"}


def test_stores_that_answer_and_that_do_not(here, monkeypatch):
    assert _checks()["store"].state == "optional"
    new_store(here / "mlflow.db")
    assert _checks()["store"].state == "ok"
    assert "0 registered models" in _checks()["store"].found
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    store = _checks()["store"]
    assert (store.state, store.remedy) == ("problem", "start the server, or unset MLFLOW_TRACKING_URI")
    assert "\n" not in store.found


def test_a_disk_that_is_nearly_full(here, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE", 5 * doctor.GIGABYTE)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**9))
    assert {_checks()[n].state for n in ("disk here", "disk of temporary files")} == {"problem"}
    monkeypatch.setenv("PLANES_CACHE", str(here / "not" / "yet"))
    assert str(here / "not" / "yet") in _checks()["disk of downloaded versions"].found


def test_planes_is_every_command():
    done = CliRunner().invoke(main, ["--help"])
    assert all(name in done.output for name in COMMANDS)
    for name in COMMANDS:
        called = CliRunner().invoke(main, [name, "--help"])
        assert called.exit_code == 0, (name, called.output)
        assert called.output.startswith(f"Usage: main {name} ") or f" {name} " in called.output.splitlines()[0]
    assert "did you mean train-detector?" in CliRunner().invoke(main, ["train_detector"]).output
    assert "No such command 'xyz'" in CliRunner().invoke(main, ["xyz"]).output
