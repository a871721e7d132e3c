"""A training in two processes through the command: stopped by Ctrl-C, killed, gone on with to the undisturbed weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import psutil
import pytest

from tests.journeys.conftest import Project, error_line

pytestmark = [pytest.mark.xdist_group("engines"), pytest.mark.slow]

SMALL = "window=64 training.batch_size=2 training.evaluate_every=20 training.checkpoint_every=2 architecture.norm=group"
SMALL += " architecture.backbone=resnet18 architecture.fpn_channels=32 architecture.head_channels=64"
STEPS = 40


@pytest.fixture(scope="module")
def project(tmp_path_factory, airfield):
    """A working folder without any model."""
    return Project(tmp_path_factory.mktemp("processes"), airfield)


def _start(project, command):
    return subprocess.Popen(
        command,
        cwd=project.folder,
        env=project.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )


def _at_step(work, process, least):
    """Wait for a checkpoint later than the one that was there; the processes that train."""
    checkpoint, deadline = work / "checkpoint.pt", time.monotonic() + 200
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    assert len(children) == least
    return children


def _gone(children):
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_stopped_killed_and_gone_on_with_two_processes_end_with_the_undisturbed_weights(project, tmp_path):
    command = ["python", "-m", "pipelines.steps.train_detector", "--data", str(project.data), "--name", "two"]
    command += ["--device", "cpu", "--num-gpus", "2", "--set", SMALL, "--steps", str(STEPS), "--work-dir"]

    whole = project.run(*command, str(tmp_path / "whole"), real=True)
    assert "two version 1: test AP" in whole.stdout
    assert whole.stdout.count("val/AP") >= 1
    assert "Gloo" not in whole.stdout + whole.stderr
    assert "find_unused" not in whole.stderr

    command.append(str(tmp_path / "cut"))
    process = _start(project, command)
    while not (folders := list((tmp_path / "cut").glob("two-*"))):
        assert process.poll() is None
        time.sleep(0.02)
    work = folders[0]
    children = _at_step(work, process, 2)
    # As a terminal does: to all processes of the command.
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stops when this step is done and saved" in said
    assert "Stopped; the same command goes on from step" in said
    assert "Traceback" not in said
    _gone(children)

    # One of the two is lost: the command ends by itself.
    process = _start(project, command)
    children = _at_step(work, process, 2)
    children[1].kill()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 1
    done = subprocess.CompletedProcess(command, 1, out, said)
    assert "training process 2 of 2 was ended by signal 9 (SIGKILL)" in error_line(done)
    _gone(children)

    # The command itself is lost: its processes end by themselves.
    process = _start(project, command)
    children = _at_step(work, process, 2)
    process.kill()
    process.communicate()
    _gone(children)
    assert not (work / "registered").exists()

    done = project.run(*command, real=True)
    assert "going on from step" in done.stdout
    versions = [project.client.get_model_version("two", n) for n in ("1", "2")]
    assert versions[0].tags["weights_sha256"] == versions[1].tags["weights_sha256"]
    run_id = json.loads((work / "run.json").read_text())["run_id"]
    run = project.client.get_run(run_id)
    assert (run.info.status, run.data.tags["num_gpus"]) == ("FINISHED", "2")
    steps = [m.step for m in project.client.get_metric_history(run_id, "train/loss")]
    assert steps == list(range(1, STEPS + 1))
