"""Fixtures shared by all tests: small data, small models, real images where they are at hand."""

from __future__ import annotations

import gc
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import settings

from models.engines.openvino.telemetry import opt_out
from tests import stores

# Two test processes with two threads each on two cores would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests talk to loopback alone.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
    os.environ.pop(name, None)

# A test beside a training may take long for reasons that are not its own.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

# Before any test imports OpenVINO.
opt_out()
# Imports leave no garbage, and looking for it takes a fifth of their time.
gc.disable()

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


# What a whole run holds on disk at a time, and some more.
DISK_GIGABYTES = 6
NUMBERS = itertools.count()


def pytest_sessionstart(session: pytest.Session) -> None:
    """A whole run on a disk that is too small ends at once, not in a thousand errors after an hour."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if session.config.getoption("numprocesses", None) and free < DISK_GIGABYTES:
        pytest.exit(
            f"{tempfile.gettempdir()}: {free:.1f} GB free, a run of all tests needs {DISK_GIGABYTES}; "
            "make room there, or name another folder with TMPDIR",
            returncode=1,
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    """A limit of time for `make soak`."""
    parser.addoption("--until", type=float, help="a test that has not begun by then (seconds since 1970) is skipped")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a limit leaves out is said, not forgotten."""
    until = item.config.getoption("--until")
    if until and time.time() > until:
        pytest.skip("no time was left for it (--until)")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A test process that is lost says how it ended."""
    if error and hasattr(node.gateway._io, "popen"):
        try:
            status = node.gateway._io.popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            status = "nothing yet: it is cut off, and there still"
        print(f"\n{node.gateway.id} ended with {status}", file=sys.stderr)


def pytest_collection_finish(session: pytest.Session) -> None:
    """From here on garbage is looked for, but not in what was imported."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """What is left goes with the process; pytest would look through all of it five times."""
    gc.freeze()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the test's own, removed when the test has passed.

    Its name is never used again in this process: MLflow keeps connections to stores by their path.
    """
    failed = request.session.testsfailed
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.mktemp(f"{name}-{next(NUMBERS)}", numbered=False)
    yield folder
    if request.session.testsfailed == failed:
        shutil.rmtree(folder, ignore_errors=True)


# Groups of tests that run on one worker each, those that take longest first.
LONGEST_FIRST = ("journey", "registry", "versions", "mlproject", "engines", "ray", "demo", "real")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long groups first, so that at the end short tests fill what is left (with --no-loadscope-reorder)."""
    # The whole demo and the real trainings are the longest of the soak tests, and the last to be left out.
    whole = ("demo", "real") if config.getoption("markexpr") == "soak" else ()
    order = (*whole, *(name for name in LONGEST_FIRST if name not in whole))

    def place(item: pytest.Item) -> int:
        marker = item.get_closest_marker("xdist_group")
        name = marker.args[0] if marker else ""
        return order.index(name) if name in order else len(order)

    items.sort(key=place)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def isaid() -> Path:
    """Real course-layout data."""
    if not (SHARED / "isaid-planes").is_dir():
        pytest.skip("real images of iSAID planes are not at hand (../shared/data/isaid-planes)")
    return SHARED / "isaid-planes"


@pytest.fixture(scope="session")
def dota() -> Path:
    """Real tiles with plane boxes."""
    if not (SHARED / "dota-planes").is_dir():
        pytest.skip("real tiles of DOTA planes are not at hand (../shared/data/dota-planes)")
    return SHARED / "dota-planes"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of this run, for what each would make again; nothing in it is changed once made."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def one_empty_store(shared: Path) -> None:
    """Stores of tests are copies of one."""
    stores.shared = shared


@pytest.fixture(scope="session")
def airfield(shared: Path) -> Path:
    """A small synthetic airfield: 5 training and 2 test scenes of 512 pixels."""
    from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield

    # Of several processes one draws it, the others wait.
    folder = shared / "data" / "airfield"
    prepare_airfield(folder, AirfieldSettings(train=5, test=2, size=512, planes_min=6, planes_max=9))
    return folder


def write_image(path: Path, height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """Write a random RGB image and return it."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return image
