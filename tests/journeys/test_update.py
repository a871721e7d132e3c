"""`score --update` as a nightly command: nothing new, one new image, a kill, two at once, Ray."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from scoring import mlflow_log
from scoring.jobs.manifest import STAGING, read_manifest
from tests.conftest import write_image
from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("journey")


@pytest.fixture
def survey(tmp_path):
    """Six images without annotations, and the command over them."""
    for i in range(6):
        write_image(tmp_path / "in" / f"{i}.png", 96, 96, i)
    where = ("--data", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--shard", "2", "--update")
    return tmp_path / "in", tmp_path / "out" / "planes-det-1", ("--model", "planes-det/1", *where)


def _scored(project, done):
    return project.client.get_run(re.search(r"run ([0-9a-f]{32})", done.stdout)[1])


def test_each_night_scores_what_is_new_and_logs_it(project, survey, tmp_path):
    images, folder, command = survey
    first = _scored(project, project.score(*command))
    assert "generation" not in first.data.tags
    rows = pq.read_table(folder / "instances.parquet").to_pylist()
    written = (folder / "coco_results.json").stat().st_mtime_ns

    nothing = project.score(*command)
    assert "nothing new" in nothing.stdout
    assert not re.search(r"run [0-9a-f]{32}", nothing.stdout)
    assert (folder / "coco_results.json").stat().st_mtime_ns == written

    write_image(images / "new.png", 96, 96, 50)
    (images / "3.png").unlink()
    done = project.score(*command)
    assert "generation 2: 1 new, 0 changed, 0 retried, 0 returned, 5 kept, 1 gone" in done.stdout
    run = _scored(project, done)
    assert (run.data.tags["generation"], run.data.metrics["generation_new"], run.data.metrics["images"]) == ("2", 1, 6)
    logged = {a.path for a in project.client.list_artifacts(run.info.run_id, "scoring")}
    assert {"scoring/instances.parquet", "scoring/gone"} <= logged
    after = pq.read_table(folder / "instances.parquet").to_pylist()
    kept = [row for row in rows if row["image_id"] != "3"]
    assert [row for row in after if row["image_id"] != "new"] == kept
    fresh = tmp_path / "fresh"
    project.score("--model", "planes-det/1", "--data", str(images), "--out", str(fresh), "--shard", "2")
    assert (fresh / "planes-det-1" / "instances.parquet").read_bytes() == (folder / "instances.parquet").read_bytes()
    assert "nothing new" in project.score(*command).stdout


def test_a_killed_night_is_made_up_for(project, survey, tmp_path):
    images, folder, command = survey
    project.score(*command)
    for i in range(40):
        write_image(images / f"n{i:02}.png", 96, 96, 100 + i)
    running = project.start("score", *command)
    pieces = folder / STAGING / "pieces" / "000001" / "shards"
    deadline = time.monotonic() + 120
    while not list(pieces.glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(running.process.pid, signal.SIGSTOP)
    # While it works, a second one is refused and the earlier table is whole.
    second = project.score(*command, code=1)
    assert "another score is writing there" in error_line(second)
    running.kill()
    running.wait()
    assert len(read_manifest(folder).generations) == 0
    done = project.score(*command)
    assert re.search(r"46 images, \d+ of them scored before", done.stdout)
    assert "generation 2: 40 new" in done.stdout
    fresh = tmp_path / "fresh"
    project.score("--model", "planes-det/1", "--data", str(images), "--out", str(fresh), "--shard", "2")
    assert (fresh / "planes-det-1" / "instances.parquet").read_bytes() == (folder / "instances.parquet").read_bytes()


def test_what_is_too_large_for_the_store_stays_where_it_is(project, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_log, "MOST_BYTES", 2000)
    monkeypatch.setattr(mlflow_log, "MOST_FILES", 1)
    folder = tmp_path / "out" / "planes-det-1"
    data = ("--data", str(project.data))
    done = project.score("--model", "planes-det/1", *data, "--out", str(tmp_path / "out"))
    large = {p.name for p in folder.glob("[!.]*.*") if p.stat().st_size > 2000} | {"overlays"}
    assert "instances.parquet" in large
    assert f"left where they are: {', '.join(sorted(large))}\n" in done.stdout
    run_id = _scored(project, done).info.run_id
    logged = {Path(a.path).name for a in project.client.list_artifacts(run_id, "scoring")}
    assert "done.json" in logged
    assert not logged & large
    # A comparison takes the table from there, unless it is another one by now.
    compared = project.score("compare", run_id, str(folder), *data, "--out", str(tmp_path / "c"))
    assert "AP +0.000" in compared.stdout
    (folder / "instances.parquet").write_bytes(b"another")
    gone = project.score("compare", run_id, *data, "--out", str(tmp_path / "c"), code=1)
    assert f"run {run_id}: its table was too large to be logged, and {folder}" in error_line(gone)


def test_outlines_in_given_boxes_are_not_brought_up_to_date(project, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(project.data, data)
    command = ("--model", "planes-unet/1", "--out", str(tmp_path / "out"), "--update")
    project.score(*command, "--data", str(data), "--split", "test")
    refused = project.score(*command, "--data", str(data), "--split", "train", code=1)
    assert "planes-unet/1: outlines given boxes" in error_line(refused)


def test_update_and_fresh_exclude_each_other(project, survey):
    assert "give one of them" in project.score(*survey[2], "--fresh", code=2).stderr
