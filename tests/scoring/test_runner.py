"""The local runner: batches by size, memory that does not suffice, images that a model cannot take; a full disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.engines.torchvision.predictor import TorchvisionDetector
from models.errors import DataError, ModelError, OutputError
from models.geometry.rle import rle_encode
from models.instances import Instances
from models.runtime import timing
from models.runtime.out_of_memory import predict_in_halves
from models.tiling.predictor import Tiled
from models.tiling.settings import Tiling
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.job import run_job
from scoring.jobs.shards import totals_of
from scoring.requests import JobSettings
from scoring.runners.local import LocalRunner, auto_workers
from tests.conftest import write_image
from tests.scoring.test_job import Brightness, _digests, _run


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Thirty images of three sizes, in turn."""
    folder = tmp_path_factory.mktemp("mixed")
    for i in range(30):
        write_image(folder / f"{i:02}.png", 20 + 4 * (i % 3), 30, i)
    return folder


class Noting(Brightness):
    """Remembers the sizes of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = []

    def predict(self, images):
        self.batches.append([image.shape[0] for image in images])
        return super().predict(images)


class OutOfMemoryError(RuntimeError):
    """Called as torch calls it."""


class Small(Noting):
    """A device that holds two images."""

    def predict(self, images):
        if len(images) > 2:
            raise OutOfMemoryError("CUDA out of memory")
        return super().predict(images)


def test_images_of_one_size_share_batches_and_the_table_keeps_its_order(mixed, tmp_path):
    one = _run(tmp_path / "one", mixed, settings=JobSettings(overlays=0, score_threshold=0))
    predictor = Noting()
    settings = JobSettings(batch_size=4, shard_size=15, overlays=0, score_threshold=0, workers=3)
    job = _run(tmp_path / "four", mixed, predictor, settings)
    assert all(len(set(sizes)) == 1 for sizes in predictor.batches)
    # A shard of 15 has 5 images of each size: a batch of 4 and one of 1 of each.
    assert sorted(map(len, predictor.batches)) == [1] * 6 + [4] * 6
    assert job.images == one.images == 30
    tables = [pq.read_table(tmp_path / name / "m-1" / "instances.parquet") for name in ("one", "four")]
    assert tables[0].equals(tables[1])


def test_images_of_many_sizes_do_not_pile_up(tmp_path):
    for i in range(40):
        write_image(tmp_path / "in" / f"{i:02}.png", 20 + i, 30, i)
    runner = LocalRunner(Noting(), batch_size=2)
    order = [index for _, index, _ in runner.results([open_dataset(tmp_path / "in").samples])]
    assert sorted(order) == list(range(40))
    # At most four batches' worth wait for others of their size: an image comes out no more than eight places late.
    assert max(place - index for place, index in enumerate(order)) <= 8
    assert all(index <= place + 8 for place, index in enumerate(order))


def test_batches_that_do_not_fit_are_parted(mixed, tmp_path):
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(7)]
    results = predict_in_halves(Small(), images)
    assert [f.image_id for f in results] == [str(i) for i in range(7)]
    assert np.allclose([f.scores[0] * 255 for f in results], range(7))
    small = Small()
    settings = JobSettings(batch_size=5, overlays=0, score_threshold=0)
    assert _run(tmp_path, mixed, small, settings).images == 30
    assert max(map(len, small.batches)) == 2
    tiled = Tiled(Small(), Tiling(size=32, batch=8))
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    assert len(tiled.predict_tiles([image])[0]) == len(
        Tiled(Brightness(), Tiling(size=32, batch=8)).predict_tiles([image])[0]
    )

    class Full(Brightness):
        def predict(self, images):
            raise MemoryError

    with pytest.raises(DataError, match=r"4 x 4 pixels need more memory than there is; predict by tiles"):
        predict_in_halves(Full(), images[:1])


def test_an_image_that_the_model_cannot_take_is_an_error_and_a_broken_gpu_the_end(mixed, tmp_path):
    class Picky(Brightness):
        what = ValueError("odd\nnumber")

        def predict(self, images):
            if any(image.shape[0] == 24 for image in images):
                raise self.what
            return super().predict(images)

    settings = JobSettings(batch_size=4, overlays=0, score_threshold=0)
    job = _run(tmp_path / "a", mixed, Picky(), settings)
    assert (job.images, job.failures) == (20, 10)
    errors = pq.read_table(tmp_path / "a" / "m-1" / "errors.parquet").to_pylist()
    assert {e["kind"] for e in errors} == {"prediction"}
    assert errors[0]["message"] == f"{errors[0]['path']}: ValueError: odd number"
    for broken in (RuntimeError("CUDA error: device-side assert triggered"), ModelError("weights")):
        Picky.what = broken
        with pytest.raises(type(broken)):
            _run(tmp_path / "b", mixed, Picky(), settings)


def test_annotated_images_that_cannot_be_read_are_errors_too(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png", 20, 30)
    (tmp_path / "b.png").write_bytes(b"none")
    images = [{"id": i, "file_name": f"{n}.png", "height": 20, "width": 30} for i, n in enumerate("abcd", start=5)]
    planes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in range(5, 9)]
    content = {"images": images, "annotations": planes, "categories": [{"id": 1, "name": "plane"}]}
    (tmp_path / "test_coco.json").write_text(json.dumps(content))
    kept, left = (open_dataset(tmp_path / "test_coco.json", keep=keep) for keep in (True, False))
    assert (len(kept), len(left), kept.planes, left.planes) == (4, 2, 4, 2)
    # What is measured with images and what without them is no equal data.
    assert kept.digest() != left.digest()
    assert "1 missing images, kept as errors" in kept.summary()
    settings = JobSettings(overlays=0, score_threshold=0)
    job = run_job(Brightness(), "m/1", kept, tmp_path / "out", settings=settings, progress=lambda r, *_: r)
    assert (job.images, job.failures) == (2, 2)
    errors = pq.read_table(tmp_path / "out" / "m-1" / "errors.parquet").to_pylist()
    assert {e["image_id"]: e["kind"] for e in errors} == {"b": "not an image", "d": "missing"}
    assert job.metrics["AP"] >= 0


def test_timings_add_up_over_threads():
    before = timing.seconds_since()
    with timing.timed("test operation"):
        pass
    first = timing.seconds_since(before)["test operation"]
    assert 0 < first < 1
    assert timing.seconds_since(timing.seconds_since())["test operation"] == 0


def test_a_job_tells_where_its_time_went(mixed, tmp_path):
    job = _run(tmp_path, mixed, Tiled(Brightness(), Tiling(size=32)), JobSettings(overlays=0, score_threshold=0))
    assert {"decode", "wait", "tile", "merge", "write"} <= job.timings.keys()
    assert all(seconds >= 0 for seconds in job.timings.values())
    assert job.peaks["memory"] > 50
    # Jobs of other releases are read and read ours: the name on disk stays.
    done = json.loads((job.folder / "done.json").read_text())
    assert done["stages"] == job.timings
    assert set(done) == {"images", "instances", "failures", "seconds", "masks", "stages", "little", "first_little"}
    assert totals_of(job.folder).timings == job.timings
    assert auto_workers("cpu", open_dataset(mixed)) == max(1, (os.cpu_count() or 1) // 4)


class Large(Brightness):
    """Masks that take much space."""

    def predict(self, images):
        rng = np.random.default_rng(int(images[0].sum()))
        masks = [rle_encode(rng.random((100, 100)) > 0.5) for _ in range(20)]
        return [Instances.make("0", 100, 100, [[0, 0, 9, 9]] * 20, np.linspace(1, 0.1, 20), masks=masks)]


def test_a_small_disk_that_fills_up(mixed, tmp_path):
    """A real file system of half a megabyte; made larger, the job goes on and ends as on a large one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=500k", "none", str(small)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root and mount)")
    try:
        settings = JobSettings(shard_size=2, overlays=0, score_threshold=0)
        with pytest.raises(OutputError, match=r"No space left on device\); what is done is kept, call again"):
            _run(small, mixed, Large(), settings)
        kept = len(list((small / "m-1" / "shards").glob("[0-9]*")))
        assert 0 < kept < 15
        subprocess.run([str(mount), "-o", "remount,size=20m", str(small)], check=True)
        job = _run(small, mixed, Large(), settings)
        assert job.resumed == 2 * kept
        _run(tmp_path / "large", mixed, Large(), settings)
        assert _digests(small) == _digests(tmp_path / "large")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_half_precision_computes_boxes_in_full(tmp_path):
    torch.manual_seed(0)
    small = {"backbone": "resnet18", "norm": "batch", "levels": [2, 3], "fpn_channels": 16, "head_channels": 32}
    more = {"anchor_sizes": [[16], [32], [64]], "min_size": None, "proposals": 50, "score_threshold": 0.0}
    detector = TorchvisionDetector(build_detector(DetectorArchitecture(**small, **more), 1))
    write_image(tmp_path / "a.png", 400, 600)
    samples = open_dataset(tmp_path / "a.png").samples
    kinds = ("32", "bf16-mixed", "16-mixed")
    results = {kind: next(LocalRunner(detector, kind=kind).results([samples]))[2] for kind in kinds}
    full = results["32"]
    for kind in ("bf16-mixed", "16-mixed"):
        half = results[kind]
        assert not np.array_equal(half.scores, full.scores), "nothing ran in half precision"
        # In 16 bits every number from 256 on would be a multiple of a quarter at best.
        large = half.boxes[half.boxes > 256]
        assert (large % 0.25 != 0).mean() > 0.5
    with pytest.raises(DataError, match="precision 32, not bf16-mixed"):
        for kind in ("32", "bf16-mixed"):
            _run(tmp_path / "out", tmp_path / "a.png", settings=JobSettings(precision=kind, score_threshold=0, overlays=0))
