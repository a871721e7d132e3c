"""Scoring on Ray: the same tables as in this process, also when actors are killed."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest

from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.engines.torchvision.predictor import detector_spec
from models.loading import load_model
from models.saved.folder import save_model
from models.twins import make_twin
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.job import run_job
from scoring.jobs.shards import finished
from scoring.reader import Failure
from scoring.requests import JobSettings
from scoring.runners import ray_runner
from scoring.runners.ray_runner import RayRunner, RaySettings
from tests.conftest import write_image
from tests.scoring.bad_files import write_bad_files
from tests.scoring.test_job import _digests

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray (the extra 'ray') is not installed"),
    # One Ray at a time on a small machine.
    pytest.mark.xdist_group("ray"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved detector with random weights that finds something everywhere."""
    import torch

    torch.manual_seed(0)
    small = {"backbone": "resnet18", "norm": "batch", "levels": [2, 3], "fpn_channels": 16, "head_channels": 32}
    more = {"anchor_sizes": [[16], [32], [64]], "min_size": 96, "max_size": 256, "proposals": 50, "score_threshold": 0.0}
    architecture = DetectorArchitecture(**small, **more)
    network = build_detector(architecture, 1)
    return save_model(tmp_path_factory.mktemp("model") / "m", detector_spec(architecture, ["plane"]), network.state_dict())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eighteen images of three sizes, and six files that are none."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        write_image(folder / f"{i:02}.png", 64 + 16 * (i % 3), 96, i)
    write_bad_files(folder, 6)
    return folder


def _score(model, images, out, progress=lambda r, *_: r, runner=None, **settings):
    how = JobSettings(shard_size=3, overlays=0, score_threshold=0.0, **settings)
    predictor = load_model(model, "cpu", how.changes)
    return run_job(predictor, "m/1", open_dataset(images), out, settings=how, progress=progress, runner=runner)


def _actors():
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if "MapWorker" in " ".join(process.cmdline()) else []
    return found


class _Killing:
    """Progress that kills all actors after some of the results; ``killed`` are their process ids."""

    def __init__(self, *moments):
        self.moments, self.killed = moments, set()

    def __call__(self, results, *_):
        for number, result in enumerate(results):
            if number in self.moments:
                victims = _actors()
                assert victims
                for victim in victims:
                    os.kill(victim.pid, signal.SIGKILL)
                self.killed |= {v.pid for v in victims}
            yield result


@pytest.mark.soak
def test_tables_are_those_of_the_local_runner_also_when_two_actors_are_killed_twice(model, real_and_broken, tmp_path):
    settings = {"batch_size": 2}
    local = _score(model, real_and_broken, tmp_path / "local", **settings)
    assert local.images + local.failures == len(list(real_and_broken.iterdir()))
    assert local.failures > 5
    killing = _Killing(1, 40)
    runner = RayRunner(model, RaySettings(batch_size=2, tiling=JobSettings(**settings).changes, actors=2))
    job = _score(model, real_and_broken, tmp_path / "ray", killing, runner, **settings)
    assert len(killing.killed) > 2
    assert (job.images, job.instances, job.failures) == (local.images, local.instances, local.failures)
    assert _digests(tmp_path / "ray") == _digests(tmp_path / "local")
    assert job.timings["forward"] > 0
    assert job.peaks["memory"] > 0


@pytest.mark.soak
def test_one_runner_ends_what_the_other_began(model, images, tmp_path):
    tiled = {"tiling": {"size": 64, "overlap": 0.25}}
    local = _score(model, images, tmp_path / "local", **tiled)

    def stopping(results, *_):
        for number, result in enumerate(results):
            yield result
            if number == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _score(model, images, tmp_path / "both", stopping, **tiled)
    done = len(finished(tmp_path / "both" / "m-1"))
    assert done >= 2
    runner = RayRunner(model, RaySettings(tiling=JobSettings(**tiled).changes, actors=1))
    job = _score(model, images, tmp_path / "both", runner=runner, **tiled)
    assert job.resumed >= 3 * done
    assert (job.images, job.instances, job.failures) == (local.images, local.instances, local.failures)
    assert job.timings["forward"] > 0
    assert job.peaks["memory"] > 0
    assert _digests(tmp_path / "both") == _digests(tmp_path / "local")


@pytest.mark.soak
def test_a_twin_scores_on_ray_as_here(model, images, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setenv("PLANES_CACHE", str(tmp_path / "cache"))
    twin = make_twin(model, tmp_path / "twin", "f32")
    local = _score(twin, images, tmp_path / "local")
    job = _score(twin, images, tmp_path / "ray", runner=RayRunner(twin, RaySettings(actors=1)))
    assert (job.images, job.instances, job.failures) == (local.images, local.instances, local.failures)
    assert _digests(tmp_path / "ray") == _digests(tmp_path / "local")


def test_a_job_that_fails_ends_the_pipeline_before_the_cluster_and_at_once(model, images, tmp_path, monkeypatch):
    """After its cluster Ray's pipeline would wait for its own end for ever."""
    ended = []

    @contextmanager
    def cluster(address):
        try:
            yield
        finally:
            ended.append("cluster")

    def rows():
        try:
            for position in itertools.count():
                results = [(0, i, Failure("a", "a.png", "lost", "lost")) for i in range(3)]
                yield {"position": position, "results": pickle.dumps((results, {}, {}, []))}
        finally:
            ended.append("pipeline")

    def failing(results, *_):
        yield next(results)
        raise ZeroDivisionError("odd data")

    monkeypatch.setattr(ray_runner, "cluster", cluster)
    monkeypatch.setattr(RayRunner, "_dataset", lambda *_: SimpleNamespace(iter_rows=rows))
    monkeypatch.setattr("ray.put", lambda content: content)
    with pytest.raises(ZeroDivisionError, match="odd data") as caught:
        _score(model, images, tmp_path, failing, RayRunner(model, RaySettings()))
    # What caused it is held on to, as by a notebook: nothing is left to the end of its memory.
    assert caught.traceback
    assert ended == ["pipeline", "cluster"]
