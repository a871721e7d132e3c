"""A `score` that is killed and started again; another job in its folder; the share of errors; later exports."""

from __future__ import annotations

import shutil
import signal
import time

import pytest

from tests.conftest import write_image
from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("journey")


@pytest.fixture(scope="module")
def photos(project, tmp_path_factory):
    """Eighteen images and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(18):
        shutil.copy(project.data / "test" / f"A000{5 + i % 2}.png", folder / f"p{i:02}.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def test_killed_and_started_again_it_ends_the_same(project, photos, tmp_path):
    arguments = ("--model", "planes-det/1", "--data", str(photos), "--overlays", "0", "--shard", "2")
    project.score(*arguments, "--out", str(tmp_path / "whole"))
    killed = tmp_path / "killed" / "planes-det-1"
    running = project.start("score", *arguments, "--out", str(killed.parent))
    deadline = time.monotonic() + 120
    while len(list(killed.glob("shards/[0-9]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    assert running.wait().returncode == -signal.SIGKILL
    assert not (killed / "done.json").exists()

    other = error_line(project.score(*arguments, "--out", str(killed.parent), "--score-threshold", "0.5", code=1))
    assert "holds a scoring with score_threshold 0.05, not 0.5; name another --out, or --fresh" in other

    done = project.score(*arguments, "--out", str(killed.parent), "--max-errors", "0.01", code=3)
    assert "of them scored before" in done.stdout
    assert "in 18 images, 2 failed" in done.stdout
    assert error_line(done) == "Error: 10.0% of the images failed, more than --max-errors allows"
    for name in ("instances.parquet", "errors.parquet", "coco_results.json", "manifest.json", "inputs.parquet"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / "planes-det-1" / name).read_bytes(), name

    made = project.run("score", "export", str(killed), "--to", "coco,overlays", "--out", str(tmp_path / "later"))
    assert "coco, overlays" in made.stdout
    assert len(list((tmp_path / "later" / "overlays").iterdir())) == 3
    assert "expected some of coco" in project.run("score", "export", str(killed), "--to", "shape", code=2).stderr


@pytest.mark.soak
def test_on_ray_the_command_leaves_the_same_files(project, photos, tmp_path):
    pytest.importorskip("ray", reason="Ray (the extra 'ray') is not installed")
    arguments = ("--model", "planes-det/1", "--data", str(photos), "--overlays", "0", "--shard", "4", "--batch", "2")
    project.score(*arguments, "--out", str(tmp_path / "local"), "--workers", "2", OMP_NUM_THREADS="1")
    done = project.score(
        *arguments, "--out", str(tmp_path / "ray"), "--runner", "ray", "--actors", "1", OMP_NUM_THREADS="1"
    )
    assert "in 18 images, 2 failed" in done.stdout
    assert "forward" in done.stdout
    for name in ("instances.parquet", "errors.parquet", "coco_results.json", "manifest.json", "inputs.parquet"):
        written = [(tmp_path / runner / "planes-det-1" / name).read_bytes() for runner in ("local", "ray")]
        assert written[0] == written[1], name
    absent = project.score(
        *arguments, "--out", str(tmp_path / "no"), "--runner", "ray", "--ray-address", "127.0.0.1:1", code=1
    )
    assert "Ray at 127.0.0.1:1: cannot be started or reached" in error_line(absent)
    assert "expected 1 or more, or auto" in project.score(*arguments, "--actors", "0", code=2).stderr
    for wrong in ("8-2", "2-", "0-3", "x-3"):
        assert "expected a range such as 2-8" in project.score(*arguments, "--actors", wrong, code=2).stderr


def test_a_list_of_paths_is_scored(project, photos, tmp_path):
    write_image(tmp_path / "beside.png", 90, 120)
    listed = tmp_path / "list.csv"
    listed.write_text(f"path,note\n{photos / 'p00.png'},a\nbeside.png,b\nabsent.png,c\n")
    done = project.score("--model", "planes-det/1", "--data", str(listed), "--overlays", "0", "--out", str(tmp_path / "o"))
    assert "in 2 images, 1 failed" in done.stdout
