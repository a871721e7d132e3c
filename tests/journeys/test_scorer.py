"""An environment of requirements-scorer.txt alone: its size, what it scores, and a server in it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from pipelines.registry.twins import twins_of
from tests.journeys.conftest import error_line
from tests.journeys.stack import free_port, http_status

pytestmark = [pytest.mark.xdist_group("versions"), pytest.mark.soak]

PACKAGED = (
    "pyproject.toml",
    "planes_entry.py",
    "README.md",
    "LICENSE",
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-scorer.txt",
)


@pytest.fixture(scope="module")
def scorer(root, tmp_path_factory):
    """The folder of programs of such an environment."""
    source, venv = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("scorer")
    for name in PACKAGED:
        shutil.copy(root / name, source)
    for package in ("models", "pipelines", "scoring"):
        shutil.copytree(root / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = (str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet")
    for arguments in (("-r", "requirements-scorer.txt"), ("--no-deps", ".")):
        done = subprocess.run([*pip, *arguments], cwd=source, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
    return venv / "bin"


@pytest.fixture(scope="module")
def versions(composed):
    """A project whose detector and composition have twins."""
    project, _ = composed
    gates = project.folder / "any.yaml"
    # How fast two images go on a machine that does other work too decides no test.
    gates.write_text(
        json.dumps(
            {
                "data": [{"path": str(project.data)}],
                "gates": {},
                "accelerate": {precision: {"min_speedup": 1e-6} for precision in ("f32", "bf16")},
            }
        )
    )
    for name in ("planes-det", "planes-inst"):
        project.registry("accelerate", f"{name}/1", "--gates", str(gates), code=None)
        assert twins_of(project.client.get_model_version(name, "1")), name
    return project


def _run(scorer, project, *arguments):
    path = f"{scorer}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        arguments, cwd=project.folder, env=project.env(PATH=path), capture_output=True, text=True, timeout=300, check=False
    )


def test_the_environment_is_small(scorer):
    files = {(p.stat().st_dev, p.stat().st_ino): p.stat().st_size for p in scorer.parent.rglob("*") if p.is_file()}
    assert sum(files.values()) <= 1.0e9
    for package in ("torch", "torchvision", "timm", "segmentation_models_pytorch", "detectron2"):
        assert not list(scorer.parent.glob(f"lib/*/site-packages/{package}"))
        assert package == "detectron2" or find_spec(package)


@pytest.mark.parametrize("name", ["planes-det", "planes-inst"])
def test_its_tables_are_those_of_the_whole_environment(scorer, versions, name, tmp_path):
    arguments = ("--model", f"{name}/1", "--data", str(versions.data), "--out")
    versions.score(*arguments, str(tmp_path / "whole"), "--runtime", "openvino")
    done = _run(scorer, versions, "score", *arguments, str(tmp_path / "small"), "--runtime", "openvino")
    assert done.returncode == 0, done.stderr
    for file in ("instances.parquet", "coco_results.json", "manifest.json"):
        pair = [(tmp_path / out / f"{name}-1" / file).read_bytes() for out in ("whole", "small")]
        assert pair[0] == pair[1], file


def test_it_compares_lists_and_says_what_it_lacks(scorer, versions, tmp_path):
    both = ("--model", "planes-det/1", "--model", "planes-inst/1", "--data", str(versions.data))
    done = _run(scorer, versions, "score", *both, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "report: none, matplotlib is not installed" in done.stdout
    assert "planes-inst/1" in (tmp_path / "comparison.csv").read_text()
    listed = _run(scorer, versions, "planes-registry", "list", "planes-det")
    assert "planes-det/1" in listed.stdout, listed.stderr
    gpu = _run(scorer, versions, "score", *both, "--out", str(tmp_path / "gpu"), "--device", "cuda")
    assert "PyTorch is not installed, there is the CPU alone" in error_line(gpu)


def test_it_serves_a_twin(scorer, versions, tmp_path):
    twin = twins_of(versions.client.get_model_version("planes-det", "1"))[0]
    port = free_port()
    command = ["mlflow", "models", "serve", "-m", f"models:/{twin.model_id}", "--env-manager", "local", "--workers", "1"]
    env = versions.env(
        PATH=f"{scorer}{os.pathsep}{os.environ['PATH']}", MLFLOW_TRACKING_URI=f"sqlite:///{versions.folder / 'mlflow.db'}"
    )
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=env, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while http_status(f"http://127.0.0.1:{port}/ping") != 200:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-1500:]
            time.sleep(0.3)
        image = next(Path(versions.data).rglob("test/*.png"))
        rows = [[base64.b64encode(image.read_bytes()).decode()]]
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    local = versions.score(
        "--model", "planes-det/1", "--data", str(image), "--out", str(tmp_path / "out"), "--runtime", "openvino"
    )
    assert f"planes-det/1: {len(answer)} planes in 1 images" in local.stdout
    assert answer


def test_jobs_in_parts_need_duckdb_and_say_so(scorer, versions, root, tmp_path):
    folder = next(Path(versions.data).rglob("test/*.png")).parent
    arguments = ("--model", "planes-det/1", "--data", str(folder), "--out", str(tmp_path), "--part-size", "2")
    done = _run(scorer, versions, "score", *arguments)
    assert "jobs in parts: DuckDB is not installed; pip install duckdb" in error_line(done)
    more = [str(scorer / "python"), "-m", "pip", "install", "-q", "-r", "requirements-scorer.txt", "duckdb"]
    subprocess.run(more, cwd=root, check=True, capture_output=True, timeout=600)
    done = _run(scorer, versions, "score", *arguments)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("done/*"))
