"""`score` in parts as a command: into a folder and a bucket, what it logs, what it refuses, kill -9."""

from __future__ import annotations

import io
import os
import re
import time

import pandas as pd
import pyarrow.parquet as pq
import pytest

from scoring import in_parts
from scoring.parts.place import Place
from scoring.parts.plan import read_plan
from tests.conftest import write_image
from tests.journeys.conftest import error_line
from tests.stores import s3_server

pytestmark = pytest.mark.xdist_group("journey")


@pytest.fixture
def survey(tmp_path):
    """Seven images without annotations, one of which cannot be read."""
    for i in range(6):
        write_image(tmp_path / "in" / f"{i}.png", 96, 96, i)
    (tmp_path / "in" / "broken.png").write_bytes(b"none")
    return ("--model", "planes-det/1", "--data", str(tmp_path / "in"), "--shard", "2", "--part-size", "3")


def _tables(place):
    return {
        name: [row for file in place.names(name) for row in _rows(place.read(f"{name}/{file}"))]
        for name in ("instances", "errors")
    }


def _rows(content):
    return pq.read_table(io.BytesIO(content)).to_pylist()


def test_parts_hold_the_rows_of_the_whole_and_the_run_says_where_they_are(project, survey, tmp_path):
    project.score(*survey[:4], "--out", str(tmp_path / "whole"), "--shard", "2")
    done = project.score(*survey, "--out", str(tmp_path / "out"))
    place = Place(tmp_path / "out" / "planes-det-1")
    # Parts are whole shards.
    assert read_plan(place).part_size == 4
    assert "in: 7 images in 2 parts of 4" in done.stdout
    assert "6 images, 1 failed" in done.stdout
    tables = _tables(place)
    for name, rows in tables.items():
        assert rows == pq.read_table(tmp_path / "whole" / "planes-det-1" / f"{name}.parquet").to_pylist()
    run = project.client.get_run(re.search(r"run ([0-9a-f]{32})", done.stdout)[1])
    assert (run.data.tags["task"], run.data.tags["layout"]) == ("score", "parts")
    assert run.data.params["tables"] == str(place)
    assert (run.data.metrics["images"], run.data.metrics["errors"]) == (6, 1)
    assert run.data.metrics["instances"] == len(tables["instances"])
    assert {a.path for a in project.client.list_artifacts(run.info.run_id, "scoring")} == {
        "scoring/plan.json",
        "scoring/summary.json",
    }
    assert run.inputs.dataset_inputs[0].dataset.digest == read_plan(place).inputs
    # Called again without the size, the folder says that it lies in parts.
    again = project.score(*survey[:6], "--out", str(tmp_path / "out"))
    assert "listed 20" in again.stdout
    assert "7 of them scored before" in again.stdout
    for wrong, code in ((("--score-threshold", "0.5"), 1), (("--max-errors", "0.1"), 3)):
        assert error_line(project.score(*survey, "--out", str(tmp_path / "out"), *wrong, code=code))
    # What fails before it begins leaves the job that is there.
    assert "no split" in error_line(
        project.score(
            *survey[:2],
            *("--data", str(project.data), "--split", "tets", "--out", str(tmp_path / "out"), "--fresh"),
            code=1,
        )
    )
    assert _tables(place) == tables
    whole = project.score(*survey[:4], "--shard", "2", "--out", str(tmp_path / "out"), "--fresh")
    assert " parts of " not in whole.stdout
    assert (tmp_path / "out" / "planes-det-1" / "manifest.json").exists()
    assert not (tmp_path / "out" / "planes-det-1" / "plan.json").exists()


def test_annotated_images_do_not_lie_in_parts(project, survey, tmp_path):
    line = error_line(
        project.score(
            "--model", "planes-det/1", "--data", str(project.data), "--part-size", "3", "--out", str(tmp_path), code=1
        )
    )
    assert "annotated, or a single image" in line


def test_long_lists_lie_in_parts_of_themselves(project, survey, tmp_path, monkeypatch):
    monkeypatch.setattr(in_parts, "MOST_WHOLE", 6)
    paths = [str(p) for p in sorted((tmp_path / "in").iterdir())]
    pd.DataFrame({"path": paths}).to_parquet(tmp_path / "list.parquet")
    command = ("--model", "planes-det/1", "--data", str(tmp_path / "list.parquet"), "--out")
    done = project.score(*command, str(tmp_path / "out"))
    assert "7 images in 1 parts of 4096" in done.stdout
    # A job that began whole goes on so, and is brought up to date so.
    monkeypatch.setattr(in_parts, "MOST_WHOLE", 100)
    project.score(*command, str(tmp_path / "begun"))
    monkeypatch.setattr(in_parts, "MOST_WHOLE", 6)
    assert " parts of " not in project.score(*command, str(tmp_path / "begun")).stdout
    assert " parts of " not in project.score(*command, str(tmp_path / "begun"), "--update").stdout
    assert "1 parts of 4096" in project.score(*command, str(tmp_path / "nightly"), "--update").stdout
    monkeypatch.setattr(in_parts, "MOST_WHOLE", 7)
    assert " parts of " not in project.score(*command, str(tmp_path / "other")).stdout


def test_updates_are_generations_with_a_run_each(project, survey, tmp_path):
    nightly = (*survey, "--out", str(tmp_path / "out"), "--update")
    place = Place(tmp_path / "out" / "planes-det-1")
    project.score(*nightly)
    before = _tables(place)
    quiet = project.score(*nightly).stdout
    assert "nothing new" in quiet
    assert "run " not in quiet
    write_image(tmp_path / "in" / "new.png", 96, 96, 40)
    (tmp_path / "in" / "0.png").unlink()
    # A call without --update scores no more than what was listed.
    assert "--update takes what has come since" in project.score(*survey, "--out", str(tmp_path / "out")).stdout
    assert _tables(place) == before
    done = project.score(*nightly).stdout
    assert "generation 2: 1 new, 0 changed, 0 retried, 0 returned, 6 kept, 1 gone" in done
    assert "6 images, 1 failed" in done
    run = project.client.get_run(re.search(r"run ([0-9a-f]{32})", done)[1])
    assert run.data.tags["generation"] == "2"
    assert (run.data.metrics["images"], run.data.metrics["generation_new"], run.data.metrics["generation_gone"]) == (
        6,
        1,
        1,
    )
    assert {row["image_id"] for row in _tables(place)["instances"]} <= {"1", "2", "3", "4", "5", "new"}
    assert "nothing new" in project.score(*nightly).stdout
    # Where the store was away, the next call logs.
    (place.local / ".logged").unlink()
    assert "run " in project.score(*nightly).stdout


def test_killed_while_it_scores_into_a_bucket_it_ends_the_same(project, survey, tmp_path, monkeypatch):
    project.score(*survey, "--out", str(tmp_path / "here"))
    monkeypatch.setenv("PLANES_CACHE", str(tmp_path / "cache"))
    with s3_server("jobs"):
        known = {k: v for k, v in os.environ.items() if k.startswith("AWS_") or k == "PLANES_CACHE"}
        place = Place("s3://jobs/out/planes-det-1")
        process = project.start("score", *survey, "--out", "s3://jobs/out", **known)
        while not place.names("done"):
            assert process.process.is_alive()
            time.sleep(0.02)
        process.kill()
        process.wait()
        done = project.score(*survey, "--out", "s3://jobs/out", **known)
        assert "4 of them scored before" in done.stdout or "7 of them scored before" in done.stdout
        assert _tables(place) == _tables(Place(tmp_path / "here" / "planes-det-1"))
        assert not list((tmp_path / "cache").rglob("part-*"))
        # As a kill between a part's mark and the removal of its folder leaves it.
        [folder] = (tmp_path / "cache" / "scoring").iterdir()
        (folder / ".parts" / "part-000000").mkdir(parents=True)
        project.score(*survey, "--out", "s3://jobs/out", **known)
        assert not list((tmp_path / "cache").rglob("part-*"))
