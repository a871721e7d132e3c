"""Our commands as tests call them: in this process, or in one of their own, to be killed or raced.

In this process a command costs what it does and not a second of imports; it gets the working
folder, environment and arguments of a process of its own, and leaves nothing of them behind.
What must begin from nothing (`mlflow run`, the demo, programs that load versions' code) is run
as a program.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

SCRIPTS = ("score", "planes", "planes-registry")
# What a process of its own has imported before it is asked for.
HEAVY = [
    "torch",
    "torchvision",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "pandas",
    "pyarrow",
    "cv2",
    "matplotlib.pyplot",
    "segmentation_models_pytorch",
    "faster_coco_eval",
    "pycocotools.mask",
]


def is_ours(arguments: tuple[str, ...]) -> bool:
    """Whether a command is one of ours, not another program."""
    return arguments[0] in SCRIPTS or (
        arguments[:2] == ("python", "-m") and arguments[2].startswith(("pipelines", "scoring"))
    )


def _entry(arguments: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The click command and its arguments."""
    if arguments[0] == "python":
        return import_module(arguments[2]).main, list(arguments[3:])
    (script,) = (e for e in entry_points(group="console_scripts") if e.name == arguments[0])
    return script.load(), list(arguments[1:])


@contextmanager
def working_in(folder: Path, env: dict[str, str], arguments: tuple[str, ...] = ("-c",)) -> Iterator[None]:
    """The folder, environment and arguments of a command; MLflow's own state is that of a new process."""
    import mlflow
    from mlflow.tracking import fluent

    def forget() -> None:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        # There is no public way to have no active experiment any more.
        fluent._active_experiment_id = None

    known, place, argv = dict(os.environ), os.getcwd(), sys.argv
    forget()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = list(arguments[2:] if arguments[0] == "python" else arguments)
    try:
        yield
    finally:
        forget()
        sys.argv = argv
        os.chdir(place)
        os.environ.clear()
        os.environ.update(known)


def invoke(arguments: tuple[str, ...], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Run one of our commands in this process: its exit code and what it printed."""
    from click.testing import CliRunner

    with working_in(folder, env, arguments):
        command, rest = _entry(arguments)
        result = CliRunner().invoke(command, rest, prog_name=arguments[0])
    stderr = result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        stderr += "".join(traceback.format_exception(result.exception))
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, stderr)


@dataclass
class Running:
    """A command in a process of its own."""

    process: Any
    folder: tempfile.TemporaryDirectory
    arguments: tuple[str, ...]

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self.process.kill()

    def wait(self, timeout: float = 400) -> subprocess.CompletedProcess:
        """Its exit code (minus the signal's number where one ended it) and what it printed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        out, err = (Path(self.folder.name, name).read_text(errors="replace") for name in ("out", "err"))
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, out, err)


def start(arguments: tuple[str, ...], folder: Path, env: dict[str, str]) -> Running:
    """Start one of our commands in a fork of a process that has the heavy libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    output = tempfile.TemporaryDirectory(prefix="command-")
    process = context.Process(target=_main, args=(arguments, str(folder), env, output.name))
    process.start()
    return Running(process, output, arguments)


def _main(arguments: tuple[str, ...], folder: str, env: dict[str, str], output: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with working_in(Path(folder), env, arguments):
        command, rest = _entry(arguments)
        command.main(rest, prog_name=arguments[0])
