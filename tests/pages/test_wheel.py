"""The wheel outside the repository: what it holds, that its commands run, that it notices packages of its names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from tests.pages.blocks import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.xdist_group("wheel")]

SOURCES = ("pyproject.toml", "planes_entry.py", "README.md", "LICENSE", "requirements.txt")
PACKAGES = ("models", "pipelines", "scoring")
# What is no Python: recipes, gates, the report's template, the viewer's page.
DATA = (*(f"{package}/**/*.{end}" for package in PACKAGES for end in ("yaml", "html")),)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources; pip fetches the setuptools that pyproject.toml asks for."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True, check=False, cwd=out)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("planes-*.whl")
    return built


@pytest.fixture(scope="module")
def venv(wheel, tmp_path_factory):
    """A new environment with the wheel; it sees the dependencies of the running one, but not the project there."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    subprocess.run(command, check=True, cwd=folder)
    (site,) = folder.glob("lib/*/site-packages")
    # A folder on the path by a .pth file: .pth files in it, such as that of an editable install, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def _run(venv, folder, *arguments, **env):
    known = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        arguments, cwd=folder, env={**known, "PATH": path, **env}, capture_output=True, text=True, timeout=300, check=False
    )


def test_it_holds_all_that_the_packages_have(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for pattern in ("*/**/*.py", *DATA) for path in ROOT.glob(pattern)}
    wanted = {name for name in wanted if name.split("/")[0] in PACKAGES} | {"planes_entry.py"}
    assert sum(name.endswith((".yaml", ".html")) for name in wanted) > 20
    assert not wanted - inside
    assert not {name for name in inside if name.startswith(("tests", "benchmarks", "docs"))}


def test_its_commands_run_elsewhere(venv, working_folder):
    project = working_folder("versions")
    script = "import models, pipelines, scoring, torch; [print(m.__file__) for m in (models, pipelines, scoring)]"
    places = _run(venv, project.folder, "python", "-c", script).stdout.splitlines()
    assert len(places) == 3
    assert all(Path(place).is_relative_to(venv.resolve()) or Path(place).is_relative_to(venv) for place in places), places
    assert "train-detector" in _run(venv, project.folder, "planes", "--help").stdout
    doctor = _run(venv, project.folder, "planes", "doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert f"in {venv.resolve()}" in doctor.stdout
    done = _run(venv, project.folder, "score", "--model", "planes-inst/1", "--data", "data/airfield", "--out", "found")
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(project.folder / "found" / "planes-inst-1" / "instances.parquet")) > 0
    moved = _run(venv, project.folder, "planes-registry", "list", "planes-det")
    assert "planes-det/9" in moved.stdout, moved.stderr


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("command", ["planes", "score", "planes-registry"])
def test_another_package_of_its_names_is_refused_in_one_line(venv, tmp_path, name, command):
    other = tmp_path / name
    other.mkdir()
    (other / "__init__.py").write_text("")
    done = _run(venv, tmp_path, command, "--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    (site,) = venv.glob("lib/*/site-packages")
    assert line.startswith(f"Error: package {name}: Python imports {other} instead of {site / name}; rename the other one")
    assert _run(venv, tmp_path, command, "--help").returncode == 0


def test_doctor_says_so_too(venv, tmp_path):
    """Where it was started by another way than a console command."""
    (tmp_path / "scoring").mkdir()
    (tmp_path / "scoring" / "__init__.py").write_text("")
    done = _run(venv, tmp_path, "python", "-m", "pipelines.steps.doctor")
    assert done.returncode == 1
    assert "!!  planes" in done.stdout
    assert f"package scoring is that of {tmp_path / 'scoring'}, not of" in done.stdout
