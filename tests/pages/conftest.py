"""Working folders for the pages: an empty store, or one of trained versions that is made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.tracking.moved_store import follow_move
from tests.journeys.conftest import Project
from tests.pages import world

MakeProject = Callable[[str], Project]


@pytest.fixture(scope="session")
def documented_data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data that the pages name."""
    made = shared / "documented-data"
    with FileLock(shared / "documented-data.lock"):
        if not made.exists():
            folder = tmp_path_factory.mktemp("drawing") / "data"
            folder.mkdir()
            world.make_data(folder)
            folder.rename(made)
    return made


def _made(shared: Path, name: str, work: Path, source: Path, make: Callable[[Project], None]) -> Path:
    """A folder with a store, made once: of several processes one makes it, the others wait."""
    made = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not made.exists():
            folder = work / name
            shutil.copytree(source, folder)
            make(Project(folder, folder / "data" / "airfield"))
            folder.rename(made)
    return made


@pytest.fixture(scope="session")
def documented_versions(shared: Path, tmp_path_factory: pytest.TempPathFactory, documented_data: Path) -> Path:
    """The same folder with trained versions."""
    work = tmp_path_factory.mktemp("training")
    return _made(shared, "documented-versions", work, documented_data, world.train_versions)


@pytest.fixture(scope="session")
def documented_demo(shared: Path, tmp_path_factory: pytest.TempPathFactory, documented_data: Path) -> Path:
    """The same folder after the demo, for pages that begin with it: each runs it again, and finds its work done."""
    work = tmp_path_factory.mktemp("demo")
    demo = ("python", "-m", "scoring.demo", "--steps", "4")
    return _made(shared, "documented-demo", work, documented_data, lambda project: project.run(*demo) and None)


@pytest.fixture
def working_folder(tmp_path: Path, request: pytest.FixtureRequest) -> MakeProject:
    """Makes the working folder of a page, with a store as one of these fixtures leaves it."""

    def make(state: str) -> Project:
        source: Path = request.getfixturevalue(f"documented_{state}")
        folder = copied(source, tmp_path / "planes")
        return Project(folder, folder / "data" / "airfield")

    return make


def copied(source: Path, folder: Path) -> Path:
    """A copy of a folder with its store; nothing changes an artefact once it is there, so that those are linked."""
    shutil.copytree(source, folder, copy_function=_linked)
    if (folder / "mlflow.db").exists():
        assert follow_move(folder / "mlflow.db")
    return folder


def _linked(source: str, target: str) -> str:
    if "/mlruns/" in source:
        os.link(source, target)
        return target
    return str(shutil.copy2(source, target))
