"""Scoring on Ray: the same tables as in this process, also when actors are killed."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

import psutil
import pytest

from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.engines.torchvision.predictor import detector_spec
from models.loading import load_model
from models.saved.folder import save_model
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.job import JobSettings, run_job
from scoring.jobs.shards import finished
from scoring.runners.ray_runner import RayRunner, RaySettings
from tests.conftest import write_image
from tests.scoring.bad_files import write_bad_files
from tests.scoring.test_job import _digests

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray (the extra 'ray') is not installed"),
    # One Ray at a time on a small machine.
    pytest.mark.xdist_group("journey"),
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
    """Forty images of three sizes, and six files that are none."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(40):
        write_image(folder / f"{i:02}.png", 64 + 16 * (i % 3), 96, i)
    write_bad_files(folder, 6)
    return folder


def _score(model, images, out, progress=lambda r, *_: r, runner=None, **settings):
    how = JobSettings(shard_size=3, overlays=0, score_threshold=0.0, **settings)
    predictor = load_model(model, "cpu", how.changes)
    return run_job(predictor, "m/1", open_dataset(images), out, settings=how, progress=progress, runner=runner)


def _actors():
    return [p for p in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(p.cmdline())]


# Which files, and after which shards all actors are killed.
FEW = pytest.param("some_real_and_broken", (1,))
MANY = pytest.param("real_and_broken", (1, 40), marks=pytest.mark.soak)


@pytest.mark.parametrize(("files", "moments"), [FEW, MANY])
def test_tables_are_those_of_the_local_runner_also_when_actors_are_killed(model, files, moments, tmp_path, request):
    folder = request.getfixturevalue(files)
    settings = {"batch_size": 2}
    local = _score(model, folder, tmp_path / "local", **settings)
    assert local.images + local.failures == len(list(folder.iterdir()))
    assert local.failures > 5
    killed = []

    def killing(results, *_):
        for number, result in enumerate(results):
            if number in moments:
                victims = _actors()
                assert victims
                for victim in victims:
                    os.kill(victim.pid, signal.SIGKILL)
                killed.extend(victims)
            yield result

    runner = RayRunner(model, RaySettings(batch_size=2, tiling=JobSettings(**settings).changes, actors=2))
    job = _score(model, folder, tmp_path / "ray", killing, runner, **settings)
    assert len({p.pid for p in killed}) > len(moments)
    assert (job.images, job.instances, job.failures) == (local.images, local.instances, local.failures)
    assert _digests(tmp_path / "ray") == _digests(tmp_path / "local")
    assert job.timings["forward"] > 0
    assert job.peaks["memory"] > 0


def test_one_runner_ends_what_the_other_began(model, images, tmp_path):
    tiled = {"tiling": {"size": 64, "overlap": 0.25}}
    local = _score(model, images, tmp_path / "local", **tiled)

    def stopping(results, *_):
        for number, result in enumerate(results):
            yield result
            if number == 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _score(model, images, tmp_path / "both", stopping, **tiled)
    done = len(finished(tmp_path / "both" / "m-1"))
    assert done >= 5
    runner = RayRunner(model, RaySettings(tiling=JobSettings(**tiled).changes, actors=1))
    job = _score(model, images, tmp_path / "both", runner=runner, **tiled)
    assert job.resumed >= 3 * done
    assert job.instances == local.instances
    assert _digests(tmp_path / "both") == _digests(tmp_path / "local")
