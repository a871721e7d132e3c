"""Jobs in parts on a Ray cluster of two nodes, into a bucket: the rows of the local runner, whatever is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.readers.listing import open_listing
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.job import run_job
from scoring.parts import on_ray
from scoring.parts.job import LocalParts, planned, run_parts
from scoring.parts.place import Place
from scoring.reader import Failure
from scoring.requests import JobSettings
from scoring.runners import ray_runner
from scoring.runners.local import LocalRunner
from scoring.runners.ray_runner import RaySettings
from tests.conftest import write_image
from tests.scoring.bad_files import write_bad_files
from tests.scoring.test_job import Brightness
from tests.scoring.test_parts import SETTINGS, _requested, _rows
from tests.scoring.test_ray import model
from tests.stores import new_store, s3_server

__all__ = ["model"]

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray (the extra 'ray') is not installed"),
    pytest.mark.xdist_group("ray"),
]

# Of a job whose pool grows: parts enough for two actors.
GROWING = 160
# Enough for a test; with PLANES_RAY_IMAGES=2000 PLANES_RAY_KILLS=20 it is a job of some minutes.
IMAGES, KILLS = (int(os.environ.get(f"PLANES_RAY_{name}", few)) for name, few in (("IMAGES", 120), ("KILLS", 2)))


@contextmanager
def _two_nodes():
    """A cluster of two nodes with a CPU each, beside a head without any."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        yield cluster, nodes
    finally:
        cluster.shutdown()


def _workers():
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if "MapWorker" in " ".join(process.cmdline()) else []
    return found


def test_actors_score_and_publish_what_they_are_sent(tmp_path, monkeypatch):
    """The way of a part through Ray's rows, walked in this process."""
    for i in range(10):
        write_image(tmp_path / "in" / f"{i}.png", 20, 30, i)
    (tmp_path / "in" / "bad.png").write_bytes(b"none")
    listed = tmp_path / "list.csv"
    listed.write_text("path\n" + "".join(f"in/{p.name}\n" for p in sorted((tmp_path / "in").iterdir())) + "in/later.png\n")

    class Rows:
        def __init__(self, items):
            self.items = items

        def map_batches(self, actor, *, fn_constructor_kwargs, batch_size, **how):
            assert (batch_size, how["num_cpus"]) == (1, 2 // min(2, len(self.items)))
            made = actor(**fn_constructor_kwargs)
            batches = [made({key: [value] for key, value in item.items()}) for item in self.items]
            return SimpleNamespace(iter_rows=lambda: ({k: v[0] for k, v in batch.items()} for batch in batches))

    blocks = []
    data = SimpleNamespace(
        from_items=lambda items, override_num_blocks: blocks.append(override_num_blocks) or Rows(items),
        ActorPoolStrategy=lambda size: size,
    )
    fake = SimpleNamespace(data=data, cluster_resources=lambda: {"CPU": 2})
    monkeypatch.setattr(on_ray, "import_ray", lambda: fake)
    monkeypatch.setattr(ray_runner, "import_ray", lambda: fake)
    monkeypatch.setattr(on_ray, "cluster", lambda address: nullcontext())
    monkeypatch.setattr(on_ray, "actor_errors", nullcontext)
    monkeypatch.setattr(on_ray, "packed_model", lambda folder: b"model")
    seeing = Brightness()
    monkeypatch.setattr(on_ray, "actor_runner", lambda packed, how, threads: LocalRunner(seeing))

    def run(name, parts):
        place = Place(tmp_path / name)
        plan = planned(place, open_listing(listed), _requested(tmp_path / "in", part_size=3))
        shown = []

        def progress(items, total, title):
            for item in items:
                shown.append(isinstance(item[2], Failure))
                yield item

        return run_parts(place, plan, parts(place, plan), progress), shown

    def on_actors(place, plan):
        return on_ray.RayParts(tmp_path, RaySettings(actors=2), place, plan, SETTINGS)

    here = LocalRunner(Brightness())
    local, _ = run("local", lambda place, plan: LocalParts(here, place, plan, SETTINGS, tmp_path / "s"))
    monkeypatch.setattr(on_ray, "MOST_BLOCKS", 3)
    result, shown = run("ray", on_actors)
    assert _rows(tmp_path / "ray") == _rows(tmp_path / "local")
    assert (result.images, result.failures, result.totals.instances) == (10, 2, local.totals.instances)
    assert (len(shown), sum(shown)) == (12, 2)
    assert blocks == [3, 1]
    assert result.peaks["memory"] > 0
    # What can be had by now is tried again, and no part is shown or counted as scored by that.
    write_image(tmp_path / "in" / "later.png", 20, 30, 77)
    again, shown = run("ray", on_actors)
    assert (again.images, again.failures, again.rate, shown) == (11, 1, None, [])
    assert seeing.seen == 11
    assert _rows(tmp_path / "ray")[0][-1]["image_id"] == "later"
    # Nothing is left to do: no cluster is asked for.
    monkeypatch.setattr(on_ray, "cluster", None)
    assert run("ray", on_actors)[0].images == 11


@pytest.mark.parametrize("threads", [None, "3"])
def test_a_pool_that_may_grow_asks_for_what_a_node_has_room_for(monkeypatch, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    resources = {"CPU": 64, "GPU": 3}
    nodes = [{"Alive": True, "Resources": {"CPU": 1}}, {"Alive": False, "Resources": {"CPU": 64}}]
    fake = SimpleNamespace(
        data=SimpleNamespace(ActorPoolStrategy=lambda **how: how), cluster_resources=lambda: resources, nodes=lambda: nodes
    )
    monkeypatch.setattr(ray_runner, "import_ray", lambda: fake)
    how = ray_runner.pool(RaySettings(actors=2, most_actors=8), 100)
    assert how["compute"] == {"min_size": 2, "max_size": 8}
    assert (how["num_cpus"], how["threads"], how["num_gpus"]) == (int(threads or 1), int(threads or 1), None)
    nodes.append({"Alive": True, "Resources": {"CPU": 16}})
    assert ray_runner.pool(RaySettings(actors=2, most_actors=8), 100)["threads"] == int(threads or 2)
    # No more actors than there are blocks.
    assert ray_runner.pool(RaySettings(actors=2, most_actors=8), 3)["compute"] == {"min_size": 2, "max_size": 3}
    assert ray_runner.pool(RaySettings(actors=2, most_actors=8), 1)["compute"] == {"min_size": 1, "max_size": 1}
    on_gpu = ray_runner.pool(RaySettings(device="cuda", actors=1, most_actors=4), 100)
    assert (on_gpu["compute"], on_gpu["num_cpus"], on_gpu["num_gpus"]) == ({"min_size": 1, "max_size": 4}, 1, 1)


@pytest.mark.soak
def test_two_nodes_fill_a_bucket_while_node_actor_and_driver_are_killed(model, tmp_path, monkeypatch):
    from models.loading import load_model

    images = tmp_path / "in"
    for i in range(IMAGES):
        write_image(images / f"{i:05}.png", 64, 64 + 16 * (i % 3), i)
    write_bad_files(images, 4)
    how = JobSettings(shard_size=4, overlays=0, score_threshold=0.0)
    run_job(load_model(model, "cpu"), "m", open_dataset(images), tmp_path, settings=how, progress=lambda r, *_: r)
    expected = [pq.read_table(tmp_path / "m" / f"{name}.parquet").to_pylist() for name in ("instances", "errors")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    draw, killed = random.Random(0), []
    with s3_server("jobs"), _two_nodes() as (cluster, nodes):
        place = Place(f"s3://jobs/out/{model.name}")
        command = [
            sys.executable,
            "-m",
            "scoring.cli",
            "--model",
            str(model),
            "--data",
            str(images),
            "--out",
            "s3://jobs/out",
        ]
        command += [
            "--runner",
            "ray",
            "--ray-address",
            cluster.address,
            "--actors",
            "2",
            "--part-size",
            "8",
            "--shard",
            "4",
        ]
        command += ["--score-threshold", "0"]
        for attempt in range(KILLS + 1):
            driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            before, deadline = len(place.names("done")), time.monotonic() + 600
            # Some parts further each time: a kill before the first one says nothing.
            while driver.poll() is None and len(place.names("done")) < before + draw.randrange(1, 4):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            if driver.poll() is None and attempt in (0, KILLS):
                victims = _workers()
                assert victims
                os.kill(victims[0].pid, signal.SIGKILL)
                killed.append("actor")
            if driver.poll() is None and attempt == KILLS:
                cluster.remove_node(nodes[0], allow_graceful=False)
                killed.append("node")
            elif driver.poll() is None:
                driver.kill()
                killed.append("driver")
            out, _ = driver.communicate(timeout=600)
        assert driver.returncode == 0, out
        assert killed.count("driver") == KILLS
        assert {"actor", "node"} <= set(killed)
        rows = []
        for name in ("instances", "errors"):
            files = [place.read(f"{name}/{file}") for file in place.names(name)]
            rows.append(pa.concat_tables(pq.read_table(pa.BufferReader(file)) for file in files).to_pylist())
        assert rows == expected
        assert "peak memory" in out


@pytest.mark.soak
def test_a_pool_grows_when_its_cluster_does(model, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    images = tmp_path / "in"
    for i in range(GROWING):
        write_image(images / f"{i:05}.png", 96, 96, i)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        command = [sys.executable, "-m", "scoring.cli", "--model", str(model), "--data", str(images)]
        command += ["--out", str(tmp_path / "out"), "--runner", "ray", "--ray-address", cluster.address]
        command += ["--actors", "1-2", "--part-size", "8", "--shard", "4", "--score-threshold", "0"]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        place, deadline = Place(tmp_path / "out" / model.name), time.monotonic() + 300
        while not place.names("done"):
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        [first] = _workers()
        # On a fast machine the parts would be done before Ray has started another actor.
        first.suspend()
        cluster.add_node(num_cpus=1)
        while len(_workers()) < 2:
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        first.resume()
        out, _ = driver.communicate(timeout=600)
        assert driver.returncode == 0, out
        assert f"{GROWING} images" in out
    finally:
        cluster.shutdown()
