"""Training through the commands: everything is logged, a kill loses nothing, equal trainings are reused."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.journeys.conftest import UNET, Project, error_line

pytestmark = pytest.mark.xdist_group("journey")


def _version(project, name, number="1"):
    return project.client.get_model_version(name, number)


def _history(project, run_id, key):
    return [(m.step, m.value) for m in project.client.get_metric_history(run_id, key)]


def test_a_run_holds_all_that_is_needed_to_judge_it(project):
    version = _version(project, "planes-unet")
    run = project.client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    for key, value in (
        ("training.steps", "8"),
        ("architecture.network", "unet"),
        ("training.seed", "0"),
        ("device", "cpu"),
    ):
        assert run.data.params[key] == value
    assert run.data.tags["git_commit"]
    assert [s for s, _ in _history(project, version.run_id, "train/loss")] == list(range(1, 9))
    assert [s for s, _ in _history(project, version.run_id, "lr")] == list(range(1, 9))
    assert [s for s, _ in _history(project, version.run_id, "val/IoU")] == [4, 8]
    assert run.data.metrics["wall_seconds"] > 0
    assert any(k.startswith("system/") for k in run.data.metrics)
    inputs = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert set(inputs) == {"training", "validation", "test"}
    assert inputs["training"].digest == run.data.params["data_digest"] == version.tags["data_digest"]
    artifacts = {f.path for f in project.client.list_artifacts(version.run_id)}
    assert {"recipe.yaml", "environment.txt", "figures", "evaluation"} <= artifacts
    figures = {f.path for f in project.client.list_artifacts(version.run_id, "figures")}
    assert {"figures/loss.png", "figures/val_samples.png", "figures/test_samples.png"} <= figures


def test_the_version_tells_where_it_comes_from_and_how_good_it_is(project):
    version = _version(project, "planes-det")
    assert set(json.loads(version.tags["metrics"])) >= {"AP", "AP50", "AR100"}
    assert version.tags["engine"] == "torchvision"
    model = project.client.get_logged_model(version.source.removeprefix("models:/"))
    # Only numbers on the test images carry the name test, whatever else was scored since.
    digests = {m.dataset_digest for m in model.metrics if m.key == "test/AP"}
    assert version.tags["test_digest"] in digests
    assert version.tags["data_digest"] not in digests
    evaluation = project.client.download_artifacts(version.run_id, "evaluation/test.json")
    settings = json.loads(Path(evaluation).read_text())["settings"]
    assert (settings["score_threshold"], settings["max_dets"], settings["split"]) == (0.05, [1, 10, 100], "test")


def test_kill_9_and_the_same_command_give_the_undisturbed_weights(project, tmp_path):
    def hashes():
        versions = project.client.search_model_versions("name = 'killed'")
        return [v.tags["weights_sha256"] for v in sorted(versions, key=lambda v: int(v.version))]

    command = ["python", "-m", "pipelines.steps.train_unet", "--data", str(project.data), "--name", "killed"]
    command += ["--set", " ".join((*UNET, "training.checkpoint_every=2")), "--steps", "8", "--work-dir", str(tmp_path)]
    running = project.start(*command)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert time.monotonic() < deadline
        assert running.process.is_alive()
        time.sleep(0.02)
    running.kill()
    assert running.wait().returncode == -signal.SIGKILL
    assert hashes() == []
    resumed = project.run(*command)
    assert "going on from step" in resumed.stdout
    project.run(*command)
    first, second = hashes()
    assert first == second
    run_id = _version(project, "killed").run_id
    assert [s for s, _ in _history(project, run_id, "train/loss")] == list(range(1, 9))


def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(project, tmp_path):
    command = ["python", "-m", "pipelines.steps.train_unet", "--data", str(project.data), "--name", "stopped"]
    command += ["--set", " ".join((*UNET, "training.checkpoint_every=2")), "--steps", "200", "--work-dir", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=project.folder,
        env=project.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stops when this step is done and saved; Ctrl-C again stops at once" in said
    assert "Stopped; the same command goes on from step" in said
    assert "Traceback" not in said
    run_id = json.loads(next(tmp_path.glob("*/run.json")).read_text())["run_id"]
    assert project.client.get_run(run_id).info.status == "KILLED"
    steps = [s for s, _ in _history(project, run_id, "train/loss")]
    assert steps == list(range(1, len(steps) + 1))


def test_an_equal_training_is_reused_when_asked_for(project):
    again = project.train_unet("--steps", "8", "--reuse")
    assert "version 1 has this recipe, data and code; reused" in again.stdout
    assert len(project.client.search_model_versions("name = 'planes-unet'")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "demo_unett"), "did you mean 'demo_unet'"),
        (("--set", "optimizer.lrr=1"), "did you mean 'optimizer.lr'"),
        (("--data", "absent"), "absent: no such file or folder"),
        (("--name", "planes/unet"), "'planes/unet': cannot be the name of a model"),
        (("--name", "planes-journal"), "planes-journal: is the journal of promotions"),
        (("--weights", "/absent.pth"), "weights /absent.pth: no such file"),
    ],
)
def test_mistakes_are_one_line(project, arguments, message):
    done = project.train_unet(*arguments, code=1)
    assert message in error_line(done)
    # Nothing was trained for it.
    assert "loss" not in done.stdout + done.stderr


def test_a_store_that_is_down_is_one_line(project):
    done = project.train_unet(code=1, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert "tracking store http://127.0.0.1:9: cannot be reached" in error_line(done)


def test_data_without_outlines_cannot_train_a_unet(project, dota, tmp_path):
    other = Project(tmp_path, dota)
    assert "planes have no outlines" in error_line(other.train_unet("--steps", "2", code=1))
