"""A job in shards: stopped anywhere and called again, it ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from models.errors import DataError, OutputError
from models.instances import Instances
from models.loading import load_model
from models.twins import make_twin
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.export import export_job
from scoring.jobs.job import run_job
from scoring.jobs.manifest import LOCK
from scoring.requests import JobSettings
from tests.conftest import write_image
from tests.scoring.bad_files import write_bad_files


class Brightness:
    """One box per image, its score the mean brightness; counts what it has seen."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen, self.stop_after = 0, stop_after

    def predict(self, images):
        results = []
        for i, image in enumerate(images):
            if self.seen == self.stop_after:
                raise KeyboardInterrupt
            self.seen += 1
            height, width = image.shape[:2]
            results.append(Instances.make(str(i), height, width, [[0, 0, width, height]], [image.mean() / 255]))
        return results


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twenty small images and some that cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(20):
        write_image(folder / f"i {i:02} ü.png", 20 + i, 30, i)
    write_bad_files(folder, 7)
    return folder


def _run(out, images, predictor=None, settings=None, **more):
    settings = settings or JobSettings(shard_size=4, overlays=0, score_threshold=0.0)
    return run_job(
        predictor or Brightness(), "m/1", open_dataset(images), out, settings=settings, progress=lambda r, *_: r, **more
    )


def _digests(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (LOCK, "done.json")
    }


def test_images_in_are_planes_and_errors_out(images, tmp_path):
    job = _run(tmp_path, images)
    table = pq.read_table(tmp_path / "m-1" / "instances.parquet").to_pandas()
    errors = pq.read_table(tmp_path / "m-1" / "errors.parquet").to_pandas()
    assert job.images == len(table) == 20
    assert job.failures == len(errors) == 7
    assert set(table.image_id) | set(errors.image_id) == {s.image_id for s in open_dataset(images).samples}
    assert (errors.kind != "").all()
    assert all(Path(path).name in message for path, message in zip(errors.path, errors.message, strict=True))
    assert not (tmp_path / "m-1" / "shards").exists()


def test_stopped_at_every_image_and_called_again_it_ends_the_same(images, tmp_path):
    _run(tmp_path / "whole", images)
    expected = _digests(tmp_path / "whole")
    for stop in range(0, 20, 3):
        out = tmp_path / f"at{stop}"
        first = Brightness(stop)
        with pytest.raises(KeyboardInterrupt):
            _run(out, images, first)
        second = Brightness()
        job = _run(out, images, second)
        assert _digests(out) == expected
        # What a whole shard holds is not predicted again: at most a shard is lost.
        assert first.seen + second.seen <= 20 + 4
        assert job.resumed + second.seen <= 27
    again = Brightness()
    job = _run(tmp_path / "whole", images, again)
    assert again.seen == 0
    assert job.resumed == 27
    assert _digests(tmp_path / "whole") == expected


def test_another_job_is_not_mixed_in(images, tmp_path):
    _run(tmp_path, images, model="aaa")
    other = JobSettings(shard_size=4, overlays=0, score_threshold=0.5)
    with pytest.raises(DataError, match=r"score_threshold 0\.0, not 0\.5; name another --out, or --fresh"):
        _run(tmp_path, images, settings=other, model="aaa")
    with pytest.raises(DataError, match="model aaa, not bbb"):
        _run(tmp_path, images, model="bbb")
    with pytest.raises(DataError, match="device cpu, not cuda"):
        _run(tmp_path, images, model="aaa", device="cuda:1")
    fewer = open_dataset(images).samples[3]
    with pytest.raises(DataError, match=r"other inputs: 26 images gone \(first: "):
        _run(tmp_path, fewer.path, model="aaa")
    job = _run(tmp_path, images, settings=JobSettings(shard_size=4, overlays=0, score_threshold=0.5, fresh=True))
    assert job.resumed == 0
    assert job.instances < 20


def test_a_changed_image_is_named(tmp_path):
    for i in range(3):
        write_image(tmp_path / "in" / f"{i}.png", seed=i)
    _run(tmp_path / "out", tmp_path / "in")
    write_image(tmp_path / "in" / "1.png", seed=9)
    with pytest.raises(DataError, match=r"1 images changed \(first: 1\)"):
        _run(tmp_path / "out", tmp_path / "in")


def test_two_at_once_do_not_write_into_one_folder(images, tmp_path):
    from filelock import FileLock

    (tmp_path / "m-1").mkdir()
    with FileLock(tmp_path / "m-1" / LOCK), pytest.raises(OutputError, match="another score is writing there"):
        _run(tmp_path, images)


# Imports once, then forks a job again and again and kills it at a random moment.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from tests.scoring import test_job

images, out, wanted, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 0

def run(out):
    # Loaded, and perhaps compiled, in the process that is killed: OpenVINO's threads do not outlive a fork.
    predictor = test_job.load_model(sys.argv[4]) if len(sys.argv) > 4 else None
    settings = test_job.JobSettings(shard_size=4, overlays=2, score_threshold=0.0, workers=2)
    test_job._run(out, images, predictor, settings)

def forked(out):
    child = os.fork()
    if child == 0:
        try:
            run(out)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child

started = time.monotonic()
assert os.waitpid(forked(out.with_name("whole")), 0)[1] == 0
full = time.monotonic() - started
random.seed(0)
for round_ in range(2000):
    child = forked(out)
    time.sleep(full * random.uniform(0.02, 0.3))
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    kills += status == signal.SIGKILL
    if kills == wanted:
        break
    if status == 0:
        (out / "m-1").rename(out / f"finished {round_}")
print(kills)
"""


@pytest.mark.parametrize(
    ("kills", "twin"),
    [(8, False), pytest.param(50, False, marks=pytest.mark.soak), pytest.param(50, True, marks=pytest.mark.soak)],
)
def test_killed_again_and_again_nothing_is_lost_or_doubled(request, tmp_path, root, monkeypatch, kills, twin):
    """kill -9 at random moments, some of them while shards or tables are written; a finished job begins anew."""
    # Real images take a network a minute.
    inputs, predictor = request.getfixturevalue("images" if twin else "real_and_broken"), None
    command = [sys.executable, "-c", KILLER, str(inputs), str(tmp_path / "killed"), str(kills)]
    if twin:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
        from tests.models.test_contract import MAKERS

        monkeypatch.setenv("PLANES_CACHE", str(tmp_path / "cache"))
        folder = make_twin(MAKERS["detector"](tmp_path / "parent"), tmp_path / "twin", "f32")
        command.append(str(folder))
        predictor = load_model(folder)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kills
    settings = JobSettings(shard_size=4, overlays=2, score_threshold=0.0)
    last = _run(tmp_path / "killed", inputs, predictor, settings)
    assert last.images + last.failures == len(list(inputs.iterdir()))
    assert last.failures > 5
    expected = _digests(tmp_path / "whole" / "m-1")
    assert expected.keys() >= {"instances.parquet", "errors.parquet", "manifest.json", "inputs.parquet"}
    for folder in (tmp_path / "killed").iterdir():
        assert _digests(folder) == expected


def test_a_full_disk_is_said_and_what_was_done_is_kept(images, tmp_path, monkeypatch):
    from scoring.jobs import shards

    real, written = shards.parquet.write_instances, []

    def full(predictions, path):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(predictions, path)

    monkeypatch.setattr(shards.parquet, "write_instances", full)
    with pytest.raises(OutputError, match=r"No space left on device\); what is done is kept, call again"):
        _run(tmp_path, images)
    monkeypatch.setattr(shards.parquet, "write_instances", real)
    rest = Brightness()
    job = _run(tmp_path, images, rest)
    assert job.images == 20
    assert rest.seen < 20


def test_files_are_made_from_the_table_later(images, tmp_path):
    _run(tmp_path, images)
    planes = export_job(tmp_path / "m-1", tmp_path / "later", ["coco", "overlays"], score_threshold=0.5, most=2)
    assert len(list((tmp_path / "later" / "overlays").iterdir())) <= 2
    table = pq.read_table(tmp_path / "m-1" / "instances.parquet").to_pandas()
    assert planes == (table.score >= 0.5).sum()
    with pytest.raises(DataError, match="have no masks"):
        export_job(tmp_path / "m-1", tmp_path / "later", ["kaggle"])
    with pytest.raises(DataError, match="not the folder of a scoring"):
        export_job(tmp_path, tmp_path / "later", ["coco"])
