"""Pictures by key and step: the same places each time, a bounded number, each once, and no training ended by one."""

from __future__ import annotations

import logging
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from models.geometry.rle import rle_encode
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.drawing import PREDICTED, TRUTH, draw_window
from pipelines.evaluation.inference import predict_image
from pipelines.evaluation.sample_pictures import SIDE, SamplePictures
from pipelines.tracking.pictures import LOGGED, PictureLog
from pipelines.training.loop import run
from pipelines.training.pictures import MOST_SHOWN, is_shown, show
from pipelines.use_cases.requests import TrainingRequest
from pipelines.use_cases.training import plan_training, run_plan
from tests import stores
from tests.pipelines.test_loop import _job, _Stop
from tests.pipelines.test_outlines import _write


class _Perfect:
    """Finds the planes of a data set's first image."""

    def __init__(self, dataset):
        self.boxes = dataset.samples[0].boxes

    def predict(self, images):
        return [Instances.make("0", *images[0].shape[:2], self.boxes, np.ones(len(self.boxes)))]


def _colours(picture):
    return {c for c in (TRUTH, PREDICTED) if (picture == c).all(axis=2).any()}


def test_the_same_places_are_drawn_whatever_is_predicted(tmp_path):
    dataset = _write(tmp_path)
    pictures = SamplePictures(dataset, crops=False, name="p", most=1)
    sample = dataset.samples[0]
    image = np.zeros((sample.height, sample.width, 3), np.uint8)
    for s in dataset.samples:
        pictures(image, s, predict_image(_Perfect(dataset), image, s))
    drawn = pictures.take()
    assert list(drawn) == ["p_1"]
    assert (pictures.take(), _colours(drawn["p_1"])) == ({}, {PREDICTED, TRUTH})
    pictures(image, sample, Instances.make("a", sample.height, sample.width, np.zeros((0, 4)), []))
    assert _colours(pictures.take()["p_1"]) == {TRUTH}
    # Of a segmenter the crop of one plane is enlarged.
    crops = SamplePictures(dataset, crops=True, name="c")
    masks = tuple(sample.masks)
    crops(image, sample, Instances.make("a", sample.height, sample.width, sample.boxes, np.ones(4), masks=masks))
    assert max(crops.take()["c_1"].shape) == 256


def test_a_large_image_is_shown_in_part_around_a_plane():
    height, width = 1000, 3000
    box = np.array([[2900.0, 10, 2990, 60]], np.float32)
    mask = np.zeros((height, width), bool)
    mask[10:60, 2900:2990] = True
    sample = Sample("a", "a.png", height, width, "a", box, (rle_encode(mask),), np.zeros(1, bool))
    pictures = SamplePictures(Dataset("d", "d", "test", "plane", (sample,)), crops=False, name="p")
    found = Instances.make("a", height, width, box, [0.9])
    pictures(np.zeros((height, width, 3), np.uint8), sample, found)
    picture = pictures.take()["p_1"]
    assert picture.shape == (SIDE, SIDE, 3)
    assert _colours(picture) == {TRUTH, PREDICTED}
    assert (picture[35, 2900 - (width - SIDE)] == PREDICTED).all()
    # The plane fills its window, in the middle of which there is no line.
    whole = draw_window(np.zeros((height, width, 3), np.uint8), (2900, 10, 2990, 60), sample, found.above(1))
    assert (whole[0, 0] == TRUTH).all()
    assert not whole[25, 45].any()
    part = draw_window(np.zeros((height, width, 3), np.uint8), (2800, 0, 3000, 200), sample, found.above(1))
    rows, columns = np.nonzero((part == TRUTH).all(axis=2))
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == (10, 100, 59, 189)


@pytest.mark.parametrize(("every", "total"), [(1, 5), (10, 1000), (7, 1000), (250, 20_000), (0, 30), (50, 30)])
def test_a_long_training_shows_few_validations_and_the_last_one(every, total):
    due = [step for step in range(1, total + 1) if (every and step % every == 0) or step == total]
    shown = [step for step in due if is_shown(step, every=every, total=total)]
    assert shown[-1] == total
    assert len(shown) == len(due) if len(due) <= MOST_SHOWN else MOST_SHOWN // 2 < len(shown) <= MOST_SHOWN + 1


class _Gallery(_Stop):
    def __init__(self, at=None):
        super().__init__(at)
        self.shown = []

    def on_pictures(self, step, pictures):
        self.shown.append((step, *pictures))


def _with_pictures(folder, *listeners):
    job = _job(folder, evaluate=lambda model: {"m": 0.5}, evaluate_every=5)
    job.pictures, job.listeners = lambda: {"p": np.zeros((2, 2, 3), np.uint8)}, listeners
    return run(job)


def test_the_loop_hands_pictures_to_those_that_want_them_and_again_after_a_stop(tmp_path):
    cut, plain = _Gallery(at=14), _Stop(at=None)
    with pytest.raises(SystemError):
        _with_pictures(tmp_path, cut, plain)
    gone_on = _Gallery()
    _with_pictures(tmp_path, gone_on)
    assert (gone_on.started, cut.shown) == (12, [(5, "p"), (10, "p")])
    assert gone_on.shown == [(15, "p"), (20, "p")]


def test_a_picture_that_cannot_be_had_ends_no_training(tmp_path, caplog):
    class Full(_Gallery):
        def on_pictures(self, step, pictures):
            raise OSError("disk full")

    outcome = _with_pictures(tmp_path, Full())
    assert len(outcome.history) == 20
    assert "step 5: no pictures of the validation (disk full)" in caplog.text
    calls = []
    show([_Gallery()], lambda: calls.append(1) or {}, 3, every=1, total=9)
    assert calls == [1]


def _logged(client, run_id):
    """The pictures of a run as sorted (key, step), each as often as it is there."""
    files = [f.path for f in client.list_artifacts(run_id, "images")]
    keys = sorted((m[1], int(m[2])) for f in files if (m := LOGGED.fullmatch(f)))
    # A picture and a small one of it.
    assert len(files) == 2 * len(keys)
    return keys


def test_each_key_and_step_is_logged_once_and_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    picture = np.full((8, 8, 3), 200, np.uint8)
    with stores.working_in(tmp_path) as registry:
        run_id = registry.client.create_run("0").info.run_id
        for _ in range(2):
            # As after a kill: what is known is read from the run.
            pictures = PictureLog(MlflowClient(registry.uri), run_id)
            pictures.log({"a/b": picture, "c": picture}, 4)
            pictures.log({"c": picture}, 8)
            pictures.log({"c": picture}, 8)
            assert _logged(registry.client, run_id) == [("a~b", 4), ("c", 4), ("c", 8)]
        assert registry.client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"


def test_a_store_that_takes_no_pictures_is_said_once(tmp_path, caplog, monkeypatch):
    with stores.working_in(tmp_path) as registry:
        run_id = registry.client.create_run("0").info.run_id
        pictures = PictureLog(registry.client, run_id)

        def refuse(*_, **__):
            raise mlflow.MlflowException("no room")

        monkeypatch.setattr(MlflowClient, "log_image", refuse)
        with caplog.at_level(logging.WARNING):
            for step in (1, 2):
                pictures.log({"a": np.zeros((4, 4, 3), np.uint8)}, step)
        assert caplog.text.count("does not take pictures, the run has no more of them (no room)") == 1


@pytest.mark.slow
def test_a_training_that_was_stopped_has_the_pictures_of_one_that_was_not(airfield, tmp_path):
    changes = ("training.batch_size=4", "architecture.crop_size=64", "training.evaluate_every=2", "steps=4")

    def plan(name):
        common = {"task": "unet", "recipe": "demo_unet", "data": str(airfield), "device": "cpu"}
        return plan_training(TrainingRequest(**common, register_as=name, overrides=changes, work_dir=str(tmp_path / "w")))

    with stores.working_in(tmp_path) as registry:
        client = registry.client
        whole = run_plan(registry, plan("whole")).run_id
        # No checkpoint was written yet: both validations are made again.
        with pytest.raises(SystemError):
            run_plan(registry, plan("cut"), listeners=[_Stop(at=3)])
        cut = run_plan(registry, plan("cut")).run_id
        names = [(f"test_sample_{i}", 0) for i in (1, 2)]
        steps = sorted({step for key, step in _logged(client, whole) if key.startswith("validation_sample_")})
        assert steps == [2, 4]
        assert [k for k in _logged(client, whole) if k[0].startswith("test")] == names
        assert _logged(client, cut) == _logged(client, whole)

        def content(run_id, folder):
            folder.mkdir()
            files = Path(client.download_artifacts(run_id, "images", str(folder))).glob("*.png")
            return sorted((p.name.partition("+timestamp")[0], p.read_bytes()) for p in files)

        assert content(cut, tmp_path / "a") == content(whole, tmp_path / "b")
