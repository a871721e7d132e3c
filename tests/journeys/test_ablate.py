"""The entry point `ablate`: one parent, its children, table and chart; killed, it finishes only what is missing."""

from __future__ import annotations

import csv
import io
import signal
import time

import pytest
from mlflow import artifacts

from tests.journeys.conftest import error_line

pytestmark = [pytest.mark.xdist_group("mlproject"), pytest.mark.slow]

SMALL = (
    "training.batch_size=2 window=128 training.evaluate_every=6 training.checkpoint_every=2 architecture.max_detections=20"
)


def _runs(project, **tags):
    experiment = project.client.get_experiment_by_name("planes")
    if experiment is None:
        return []
    runs = project.client.search_runs([experiment.experiment_id])
    return [r for r in runs if all(r.data.tags.get(k) == v for k, v in tags.items())]


def _table(project, run):
    text = artifacts.load_text(f"{run.info.artifact_uri}/ablation.csv")
    return list(csv.DictReader(io.StringIO(text)))


def test_killed_in_the_middle_it_finishes_only_the_missing_variant(project_copy):
    parameters = {"data": str(project_copy.data), "grid": "optimizer.lr=0.001,0.0005"}
    parameters["overrides"] = f"training.steps=6 {SMALL}"
    running = project_copy.start_entry_point("ablate", **parameters)
    deadline = time.monotonic() + 300
    folders = project_copy.folder / ".planes" / "training"
    # Looked at only once the second training has begun: by then nobody creates the store any more.
    while len(list(folders.glob("planes-ablation-*/run.json"))) < 2 or not list(folders.glob("*/checkpoint.pt")):
        assert time.monotonic() < deadline, "the second variant never began"
        assert running.process.is_alive(), "the ablation ended before it was killed"
        time.sleep(0.05)
    running.kill()
    assert running.wait().returncode == -signal.SIGKILL
    finished, unfinished = sorted(_runs(project_copy, task="detector"), key=lambda r: r.info.start_time)
    assert (finished.info.status, unfinished.info.status) == ("FINISHED", "RUNNING")

    done = project_copy.entry_point("ablate", **parameters)
    text = done.stdout + done.stderr
    assert f"done already (run {finished.info.run_id})" in text
    assert "going on from step" in text

    parents = _runs(project_copy, task="ablate")
    assert [p.info.status for p in parents] == ["FINISHED"]
    parent = parents[0]
    children = _runs(project_copy, **{"mlflow.parentRunId": parent.info.run_id})
    assert {c.data.params["optimizer.lr"] for c in children} == {"0.001", "0.0005"}
    assert [c.info.status for c in children] == ["FINISHED"] * 2
    assert {c.info.run_id for c in children} == {finished.info.run_id, unfinished.info.run_id}
    assert len(_runs(project_copy, task="detector")) == 2
    for child in children:
        steps = [p.step for p in project_copy.client.get_metric_history(child.info.run_id, "train/loss")]
        assert sorted(steps) == list(range(1, 7))
    rows = _table(project_copy, parent)
    assert [row["optimizer.lr"] for row in rows] == ["0.001", "0.0005"]
    assert {row["run_id"] for row in rows} == {c.info.run_id for c in children}
    assert all(float(row["test/AP"]) >= 0 for row in rows)
    figures = {f.path for f in project_copy.client.list_artifacts(parent.info.run_id, "figures")}
    assert figures == {"figures/ablation.png"}
    assert not [m for m in project_copy.client.search_registered_models() if m.name == "planes-ablation"]


def test_a_variant_that_fails_does_not_stop_the_others(project_copy):
    small = ("--set", f"training.steps=2 {SMALL}", "--data", str(project_copy.data))
    done = project_copy.step("ablate", *small, "--variants", "lr=0.001; lr=1e30")
    assert "variant 2/2 lr=1e30 failed" in done.stderr
    assert "the loss is" in done.stdout
    again = project_copy.step("ablate", *small, "--variants", "lr=0.001; lr=1e30")
    assert "variant 1/2 lr=0.001: done already" in again.stdout


def test_mistakes_end_in_one_line(project_copy):
    none = project_copy.step("ablate", "--data", str(project_copy.data), code=1)
    assert "give either --grid" in error_line(none)
    unknown = project_copy.step("ablate", "--data", str(project_copy.data), "--grid", "optimizer.lrr=1,2", code=1)
    assert "did you mean 'optimizer.lr'" in error_line(unknown)
    metric = project_copy.step(
        "ablate", "--data", str(project_copy.data), "--grid", "optimizer.lr=1,2", "--metric", "APP", code=1
    )
    assert "metric APP: a detector has none of that name; known: AP, AP50" in error_line(metric)
