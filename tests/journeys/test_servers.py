"""Scoring against a real MLflow server: one that goes down and comes back, two jobs at once, versions kept by digest."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from models.saved.allowed_files import SPEC_FILE
from pipelines.registry.model_versions import Registry
from tests.journeys.conftest import error_line
from tests.journeys.stack import MlflowServer

pytestmark = pytest.mark.xdist_group("versions")


@pytest.fixture(scope="module")
def server(project, tmp_path_factory):
    """A server that holds planes-det/1, and the environment of those who use it."""
    made = MlflowServer(tmp_path_factory.mktemp("server"), project.env())
    made.start()
    trained = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    use = {"MLFLOW_TRACKING_URI": made.uri, "PLANES_CACHE": str(made.folder / "cache")}
    use["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    project.register(trained, "planes-det", **use)
    yield made, use
    made.stop()


@pytest.fixture(scope="module")
def photos(project, tmp_path_factory):
    """Ten images."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(10):
        shutil.copy(project.data / "test" / f"A000{5 + i % 2}.png", folder / f"p{i:02}.png")
    return folder


def test_a_store_that_goes_down_and_comes_back(project, server, photos, tmp_path):
    made, use = server
    client = MlflowClient(made.uri)
    arguments = ("--model", "planes-det/1", "--data", str(photos), "--overlays", "0", "--shard", "2", "--out")
    out = tmp_path / "out"
    running = project.start("score", *arguments, str(out), **use)
    deadline = time.monotonic() + 120
    while not list(out.glob("*/shards/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    made.stop()
    done = running.wait()
    assert done.returncode == 1
    assert "in 10 images" in done.stdout
    assert "planes-det/1: scored, but not logged (" in error_line(done)
    assert "the same command logs them without scoring again" in error_line(done)
    table = (out / "planes-det-1" / "instances.parquet").read_bytes()
    # Down, nothing can be scored anew, and that is said before anything is done.
    assert "cannot be reached" in error_line(project.score(*arguments, str(tmp_path / "no"), code=1, **use))
    assert not (tmp_path / "no" / "planes-det-1").exists()

    made.start()
    again = project.score(*arguments, str(out), **use)
    assert "in 10 images, 10 of them scored before" in again.stdout
    run = client.get_run(re.search(r"run ([0-9a-f]{32})", again.stdout)[1])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["images"] == 10
    assert {"stage_forward_seconds", "stage_decode_seconds", "stage_write_seconds", "peak_memory_megabytes"} <= set(
        run.data.metrics
    )
    local = client.download_artifacts(run.info.run_id, "scoring/instances.parquet", str(tmp_path))
    assert Path(local).read_bytes() == table

    # The version was downloaded once; kept by its digest, it is checked and, damaged, fetched anew.
    kept = made.folder / "cache" / client.get_model_version("planes-det", "1").tags["digest"]
    before = (kept / "model.json").stat().st_mtime_ns
    (kept / "weights.safetensors").write_bytes(b"damaged")
    project.score(*arguments, str(tmp_path / "third"), **use)
    assert (kept / "model.json").stat().st_mtime_ns != before
    assert (tmp_path / "third" / "planes-det-1" / "instances.parquet").read_bytes() == table


def test_two_jobs_at_once_into_one_store(project, photos, tmp_path):
    command = ("score", "--model", "planes-det/1", "--data", str(photos), "--overlays", "0")
    jobs = [project.start(*command, "--out", str(tmp_path / str(i))) for i in range(2)]
    done = [job.wait() for job in jobs]
    assert [job.returncode for job in done] == [0, 0], done
    runs = [project.client.get_run(re.search(r"run ([0-9a-f]{32})", job.stdout)[1]) for job in done]
    assert runs[0].info.run_id != runs[1].info.run_id
    assert all(r.info.status == "FINISHED" and r.data.metrics["images"] == 10 for r in runs)
    assert len({(tmp_path / str(i) / "planes-det-1" / "instances.parquet").read_bytes() for i in range(2)}) == 1


def test_files_come_from_the_registrys_own_server(server, tmp_path, monkeypatch):
    made, _ = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'another.db'}")
    monkeypatch.setenv("PLANES_CACHE", str(tmp_path / "cache"))
    registry = Registry.connect(made.uri)
    assert (registry.fetch(registry.resolve("planes-det/1")) / SPEC_FILE).exists()


def test_files_that_are_not_those_of_the_digest_are_refused(project, server, photos, tmp_path):
    made, use = server
    weights = next((made.folder / "artefacts").rglob("weights.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        use = {**use, "PLANES_CACHE": str(tmp_path / "cache")}
        done = project.score("--model", "planes-det/1", "--data", str(photos), "--out", str(tmp_path), code=1, **use)
        assert "its files are not those that were registered" in error_line(done)
        assert not list((tmp_path / "cache").glob("[!.]*"))
    finally:
        weights.write_bytes(content)
