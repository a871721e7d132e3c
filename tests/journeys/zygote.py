"""Commands in forks of a process that has the heavy libraries loaded already.

Each command still is a process of its own, with its own working folder, environment and
exit code, and runs the same entry point; only the seconds that importing torch and MLflow
takes are paid once for all. What must be started from nothing (`mlflow run`, the demo,
programs that are killed) is.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

HEAVY = (
    "torch", "torchvision", "mlflow", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "pandas", "cv2", "pyarrow",
    "mlflow.store.model_registry.sqlalchemy_store", "matplotlib.pyplot", "segmentation_models_pytorch", "timm",
    "rich.progress", "faster_coco_eval", "pycocotools.mask", "lightning_fabric", "scipy.ndimage", "jinja2", "pydantic",
)  # fmt: skip
SCRIPTS = ("score", "planes-registry")


def can_run(arguments: tuple[str, ...]) -> bool:
    """Whether a command is one of ours."""
    return arguments[0] in SCRIPTS or arguments[:2] in (("python", "-m"), ("python", "-c"))


@dataclass
class Running:
    """A command that was started: its process id, and its exit code once it ended."""

    pid: int
    connection: socket.socket
    folder: tempfile.TemporaryDirectory
    arguments: tuple[str, ...]

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def wait(self, timeout: float = 400) -> subprocess.CompletedProcess:
        """Its exit code (minus the signal's number where one ended it) and what it said."""
        self.connection.settimeout(timeout)
        try:
            code = json.loads(_line(self.connection))
        except TimeoutError:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout) from None
        self.connection.close()
        out, err = (Path(self.folder.name, name).read_text(errors="replace") for name in ("out", "err"))
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, code, out, err)


class Zygote:
    """The process that forks; started on first use, ended with the test process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zygote-")
        self._path = f"{self._folder.name}/socket"
        self._process: subprocess.Popen | None = None

    def start(self, arguments: tuple[str, ...], cwd: Path, env: dict[str, str]) -> Running:
        """Start a command."""
        if self._process is None:
            # Its standard input closes when the test process ends, however that happens.
            command = [sys.executable, str(Path(__file__)), self._path]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
            while not os.path.exists(self._path):
                assert self._process.poll() is None, "the zygote ended"
                time.sleep(0.05)
        folder = tempfile.TemporaryDirectory(prefix="command-")
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        request = {"arguments": arguments, "cwd": str(cwd), "env": env, "folder": folder.name}
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Running(json.loads(_line(connection)), connection, folder, arguments)


def _line(connection: socket.socket) -> bytes:
    content = b""
    while not content.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the zygote hung up")
        content += part
    return content


def _serve(path: str) -> None:
    for name in HEAVY:
        __import__(name)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + "-")
    server.listen()
    os.rename(path + "-", path)
    parent = os.getppid()
    # Nobody waits for the monitors.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server.settimeout(1)
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            server.close()
            _monitor(connection)
        connection.close()


def _monitor(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    request = json.loads(_line(connection))
    pid = os.fork()
    if pid == 0:
        connection.close()
        _command(request)
    connection.sendall(json.dumps(pid).encode() + b"\n")
    _, status = os.waitpid(pid, 0)
    try:
        connection.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode() + b"\n")
    except OSError:
        pass
    os._exit(0)


def _command(request: dict) -> None:
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(f"{request['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    code = 1
    try:
        arguments = request["arguments"]
        if arguments[0] == "python":
            sys.argv = ["-c", *arguments[3:]] if arguments[1] == "-c" else arguments[2:]
            sys.path[0] = request["cwd"]
            if arguments[1] == "-c":
                exec(compile(arguments[2], "<string>", "exec"), {"__name__": "__main__"})
            else:
                runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            (script,) = (e for e in entry_points(group="console_scripts") if e.name == arguments[0])
            script.load()()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    _end(code)


def _end(code: int) -> None:
    """What the interpreter does at its end: wait for threads, run exit handlers, flush."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
