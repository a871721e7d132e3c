"""Runs the blocks of a page one after the other in its working folder, as a reader would."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from models.saved.scores import Scores
from pipelines.recipes.reading import load_recipe
from pipelines.registry.gates import parse_gates
from tests.journeys import commands
from tests.journeys.conftest import Project
from tests.journeys.stack import free_port, http_status
from tests.pages.blocks import PYTHON, Block
from tests.pages.substitutions import ENTRY_POINTS, substituted

# What runs until it is stopped, and the path that answers once it is there.
SERVERS = {"score view ": "/", "mlflow ui ": "/health", "mlflow models serve ": "/ping"}
# What some commands need that a machine may lack.
NEEDS = {"detectron2": "detectron2", "accelerate ": "openvino", "--search": "optuna", "--runner ray": "ray"}
NEEDS |= {"geopackage": "geopandas", "s3://": "s3fs"}


class PageRun:
    """One page in its folder.

    Attributes:
        faults: what did not work: place, command, exit code, output.
        lacking: what was not tried, for want of a package.
        seconds: of each command.
    """

    def __init__(self, project: Project, env: dict[str, str], server: str) -> None:
        self.project, self.env, self.server = project, env, server
        self.faults: list[str] = []
        self.lacking: list[str] = []
        self.seconds: list[tuple[float, str]] = []

    def run(self, block: Block) -> None:
        """Run it, or read it where it is a file."""
        if block.why_not():
            return
        if block.language == PYTHON:
            self._try(block, "the example", lambda: self._python(block))
        elif block.language == "yaml":
            self._try(block, "the file", lambda: _read_yaml(block.text))
        else:
            with contextlib.ExitStack() as servers:
                port = str(free_port())
                for command in block.commands:
                    if not block.why_not(command):
                        self._command(block, command, port, servers)

    def _command(self, block: Block, command: str, port: str, servers: contextlib.ExitStack) -> None:
        lacks = [package for words, package in NEEDS.items() if words in substituted(command) and not find_spec(package)]
        if lacks:
            self.lacking.append(f"{block.place}: {lacks[0]} is not installed")
            return
        text = self._filled(substituted(command), port)
        path = next((path for words, path in SERVERS.items() if text.startswith(words)), "")
        if path:
            self._try(block, text, lambda: servers.enter_context(self._serving(text, f"http://127.0.0.1:{port}{path}")))
        else:
            self._try(block, text, lambda: self._run(text))

    def _try(self, block: Block, what: str, do: Any) -> None:
        begun = time.monotonic()
        try:
            do()
        except (Exception, SystemExit) as error:
            self.faults.append(f"{block.place}: {what}\n{type(error).__name__}: {error}")
        self.seconds.append((time.monotonic() - begun, f"{block.place}: {what}"))

    def _filled(self, text: str, port: str) -> str:
        """With the names in braces replaced by what they stand for."""
        values = {"port": lambda: port, "server": lambda: self.server, "parent": self._parent}
        values |= {"scored": lambda: self._scored(0), "scored_before": lambda: self._scored(1)}
        values["submission"] = lambda: max(
            str(folder.relative_to(self.project.folder)) for folder in self.project.folder.glob("submission/planes-inst-*")
        )
        for name, value in values.items():
            if f"{{{name}}}" in text:
                text = text.replace(f"{{{name}}}", value())
        return text

    def _runs(self, text: str) -> list[str]:
        client = self.project.client
        experiments = [one.experiment_id for one in client.search_experiments()]
        return [run.info.run_id for run in client.search_runs(experiments, text, order_by=["start_time DESC"])]

    def _scored(self, before: int) -> str:
        return self._runs("tags.task = 'score'")[before]

    def _parent(self) -> str:
        run_id = self._runs("params.folds = '2'")[0]
        if "scores.json" not in {file.path for file in self.project.client.list_artifacts(run_id)}:
            # What is trained in seconds finds no plane, and its folds teach nothing of scores.
            scores = Scores(slope=1.0, intercept=0.0, threshold=0.5, detections=9, fitted_on="nothing: a test's own")
            self.project.client.log_text(run_id, scores.model_dump_json(), "scores.json")
        return run_id

    def _run(self, text: str) -> None:
        words = shlex.split(text)
        if words[:2] == ["mlflow", "run"]:
            words = self._entry_point(words)
        if words[0] == "base64":
            # Pipes are a shell's.
            words = ["bash", "-c", text]
        done = self.project.run(*words, real="ray" in words, **self.env)
        # curl ends with 0 whatever the server says.
        assert words[0] != "bash" or '"predictions"' in done.stdout, done.stdout

    def _entry_point(self, words: list[str]) -> list[str]:
        """`mlflow run .` in small; where it would make an environment first, the command that it then runs there."""
        name = words[words.index("-e") + 1]
        given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-P")
        more = ENTRY_POINTS.get(name, {})
        given |= {
            key: f"{given[key]} {value}" if key == "overrides" and key in given else value for key, value in more.items()
        }
        if "local" in words:
            return [
                *words[: words.index("-P")],
                *(word for key, value in given.items() for word in ("-P", f"{key}={value}")),
            ]
        return self.project.command_of(name, given)

    @contextlib.contextmanager
    def _serving(self, text: str, url: str) -> Iterator[None]:
        """A server that answers; in the end it is stopped as a user stops it, by Ctrl-C."""
        arguments = tuple(shlex.split(text))
        if commands.is_ours(arguments):
            running = self.project.start(*arguments, **self.env)
            _wait(url, lambda: running.process.is_alive(), text)
            try:
                yield
            finally:
                os.kill(running.process.pid, signal.SIGINT)
                ended = running.wait(60)
                assert ended.returncode == 0, f"{text}: ended with {ended.returncode}\n{ended.stderr}"
            return
        log = self.project.folder / "server.log"
        with open(log, "ab") as out:
            env = self.project.env(**self.env)
            process = subprocess.Popen(
                arguments, cwd=self.project.folder, env=env, stdout=out, stderr=out, start_new_session=True
            )
        try:
            _wait(url, lambda: process.poll() is None, text, log)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _python(self, block: Block) -> None:
        text = self._filled(substituted(block.text), "0")
        with commands.working_in(self.project.folder, self.project.env(**self.env)):
            exec(compile(text, block.place, "exec"), {"__name__": "__main__"})


def _wait(url: str, lives: Any, text: str, log: Path | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while http_status(url) != 200:
        said = log.read_text()[-2000:] if log else ""
        assert lives(), f"{text}: ended before it answered\n{said}"
        assert time.monotonic() < deadline, f"{text}: no answer from {url}\n{said}"
        time.sleep(0.2)


def _read_yaml(text: str) -> None:
    """Gates, or settings of a recipe for a detector: read by what reads them."""
    content = yaml.safe_load(text)
    if {"gates", "accelerate"} & set(content):
        parse_gates({"gates": {}, **content}, "the page's gates")
        return
    # A window and tiles exclude each other.
    load_recipe("demo_detector", ["window=null", *(f"{key}={json.dumps(value)}" for key, value in content.items())])
