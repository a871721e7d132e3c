"""A project folder in which the real commands have trained two small models."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from filelock import FileLock
from mlflow.projects.utils import load_project
from mlflow.tracking import MlflowClient

from pipelines.registry.model_versions import Registry
from pipelines.registry.registration import log_and_register
from pipelines.tracking import mlflow_runs
from pipelines.tracking.moved_store import follow_move
from tests.journeys import commands
from tests.stores import new_store

UNET = (
    *("training.batch_size=4", "architecture.crop_size=64", "training.evaluate_every=4", "training.checkpoint_every=20"),
    # Three of four passes; that a crop is mirrored too has tests of its own.
    "architecture.flips=false",
)
DETECTOR = (
    *("training.batch_size=2", "window=128", "training.evaluate_every=4", "training.checkpoint_every=20"),
    # So little training detects planes everywhere, and all of them are outlined.
    "architecture.max_detections=25",
)


@dataclass(frozen=True)
class Project:
    """A working folder with its own store; commands run there as a user would run them.

    ``empty``: the store is there and empty; else the first command makes it.
    """

    folder: Path
    data: Path
    empty: bool = True

    def __post_init__(self) -> None:
        path = self.folder / "mlflow.db"
        if self.empty and self.folder.is_dir() and not path.exists():
            new_store(path)

    @property
    def client(self) -> MlflowClient:
        """A client of the folder's store."""
        return MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def run(
        self, *arguments: str, code: int | None = 0, timeout: float = 400, real: bool = False, **env: str
    ) -> subprocess.CompletedProcess:
        """Run a command and check its exit code: ours in this process, others with this Python's programs first on PATH.

        ``real``: ours as a program too.
        """
        # What is read when Python starts cannot be set afterwards.
        if commands.is_ours(arguments) and not real and "PYTHONPATH" not in env:
            done = commands.invoke(arguments, self.folder, self.env(**env))
        else:
            done = subprocess.run(
                arguments,
                cwd=self.folder,
                env=self.env(**env),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        if code is not None:
            assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str, **env: str) -> commands.Running:
        """Start one of our commands in a process of its own, to be waited for or killed."""
        return commands.start(arguments, self.folder, self.env(**env))

    def register(self, saved: Path, name: str, tags: Mapping[str, str] | None = None, **env: str) -> None:
        """Register a saved folder as a training does, with an example of a drawn plane."""
        with commands.working_in(self.folder, self.env(**env)):
            registry = Registry.connect()
            with mlflow_runs.tracked_run(registry.client, "given", {"mlflow.user": "trainer"}) as run:
                image = np.full((96, 96, 3), 90, np.uint8)
                cv2.line(image, (48, 10), (48, 86), (250, 250, 250), 8)
                cv2.line(image, (14, 44), (82, 44), (250, 250, 250), 10)
                log_and_register(registry, saved, name, example=image, tags=dict(tags or {}), run_id=run.info.run_id)

    def env(self, **more: str) -> dict[str, str]:
        """The environment of a command."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "COLUMNS": "200", **more}

    def step(self, name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Run an entry point."""
        return self.run("python", "-m", f"pipelines.steps.{name}", *arguments, **options)

    def score(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Run the score command."""
        return self.run("score", *arguments, **options)

    def registry(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Run the planes-registry command."""
        return self.run("planes-registry", *arguments, **options)

    def entry_point(self, entry: str, **parameters: str) -> subprocess.CompletedProcess:
        """Run the command that `mlflow run` makes of an entry point of the folder's MLproject in this process."""
        return self.run(*self.command_of(entry, parameters), MLFLOW_EXPERIMENT_NAME="planes")

    def start_entry_point(self, entry: str, **parameters: str) -> commands.Running:
        """Start that command in a process of its own."""
        return self.start(*self.command_of(entry, parameters), MLFLOW_EXPERIMENT_NAME="planes")

    def command_of(self, entry: str, parameters: Mapping[str, str]) -> list[str]:
        """The command that `mlflow run` makes of an entry point of the folder's MLproject."""
        loaded = load_project(str(self.folder)).get_entry_point(entry)
        return shlex.split(loaded.compute_command(dict(parameters), storage_dir=None))

    def train_unet(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Train a tiny U-Net."""
        return self.step("train_unet", "--data", str(self.data), "--set", " ".join(UNET), *arguments, **options)

    def train_detector(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Train a tiny detector."""
        return self.step("train_detector", "--data", str(self.data), "--set", " ".join(DETECTOR), *arguments, **options)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a failed command says; no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.rstrip().endswith(lines[0])
    return lines[0]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, shared: Path, airfield: Path) -> Project:
    """planes-unet/1 (8 steps) and planes-det/1 (40 steps) trained and registered."""
    trained = shared / "trained-project"
    # Of several processes one trains, the others wait; each takes a copy, whose store follows the move.
    with FileLock(shared / "trained-project.lock"):
        if not trained.exists():
            made = Project(tmp_path_factory.mktemp("training"), airfield)
            made.train_unet("--steps", "8")
            # The best of ten validations is taken.
            made.train_detector("--steps", "40")
            made.folder.rename(trained)
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    assert follow_move(folder / "mlflow.db")
    return Project(folder, airfield)


def train_gated(project: Project, *steps: str) -> None:
    """gated/1, gated/2, ... of so many steps."""
    for number in steps:
        project.train_unet("--name", "gated", "--steps", number)


@pytest.fixture(scope="session")
def gated(project: Project) -> Project:
    """gated/1 and gated/2 equal to the bit, gated/3 trained for longer."""
    train_gated(project, "4", "4", "24")
    hashes = [project.client.get_model_version("gated", str(n)).tags["weights_sha256"] for n in (1, 2, 3)]
    assert hashes[0] == hashes[1] != hashes[2]
    return project


@pytest.fixture(scope="session")
def composed(project):
    """planes-inst/1 from planes-det/1 and a U-Net that has learnt a little, and what the command said."""
    project.train_unet("--name", "outliner", "--steps", "30", "--set", "training.evaluate_every=30")
    parts = ("--detector", "planes-det/1", "--segmenter", "outliner/1")
    done = project.step("compose", *parts, "--data", str(project.data))
    return project, done.stdout


@pytest.fixture(scope="module")
def project_copy(tmp_path_factory: pytest.TempPathFactory, root: Path, airfield: Path) -> Project:
    """A copy of what `mlflow run .` needs, with a store of its own."""
    folder = tmp_path_factory.mktemp("copy") / "planes"
    folder.mkdir()
    for name in ("models", "pipelines", "scoring"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("MLproject", "conda.yaml", "requirements.txt"):
        shutil.copy(root / name, folder / name)
    return Project(folder, airfield, empty=False)
