"""The one loop that predicts: turns, reads, failures and results that are known already."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from pycocotools.cocoeval import Params

from models.errors import DataError
from models.images.rendering import DEFAULT, Rendering
from models.instances import Instances
from pipelines.data.dataset import Sample
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.inference import predict_dataset, predict_images
from pipelines.evaluation.metrics import SIZE_CLASSES


class Detector:
    """One plane in every image; refuses images of one brightness."""

    def __init__(self, refused=None):
        self.refused = refused

    def predict(self, images):
        if self.refused is not None and images[0].max() == self.refused:
            raise RuntimeError("odd image")
        return [Instances.make("0", *images[0].shape[:2], [[1, 1, 5, 5]], [0.5])]


@pytest.fixture
def images(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((20, 30, 3), 80 + i, np.uint8)).save(tmp_path / f"{i}.png")
    return open_dataset(tmp_path)


@pytest.fixture
def reads(monkeypatch):
    """The images that are read, with their renderings."""
    read, made = Sample.read, []
    monkeypatch.setattr(Sample, "read", lambda self: made.append((self.image_id, self.rendering)) or read(self))
    return made


def test_predictors_take_turns_and_share_an_image_that_both_read_alike(images, reads):
    results = list(predict_images({"a": Detector(), "b": Detector()}, images.samples))
    assert [(r.sample.image_id, r.label) for r in results] == [
        *(("0", "b"), ("0", "a"), ("1", "a"), ("1", "b"), ("2", "b"), ("2", "a"), ("3", "a"), ("3", "b"))
    ]
    assert [image_id for image_id, _ in reads] == ["0", "1", "2", "3"]
    assert all(r.outcome.image_id == r.sample.image_id and r.seconds > 0 for r in results)
    reads.clear()
    other = Rendering(range=(0, 200))
    list(predict_images({"a": Detector(), "b": Detector()}, images.samples[:1], renderings={"a": other}))
    assert reads == [("0", DEFAULT), ("0", other)]


def test_an_image_fails_for_one_predictor_alone_and_known_results_are_left_out(images):
    known = {("b", "0"), ("a", "3")}
    results = {
        (r.label, r.sample.image_id): r
        for r in predict_images({"a": Detector(refused=81), "b": Detector()}, images.samples, known=known)
    }
    assert set(results) == {("a", "0"), ("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"), ("b", "3")}
    failed = results.pop(("a", "1"))
    assert isinstance(failed.outcome, DataError)
    assert "odd image" in str(failed.outcome)
    assert failed.image is None
    assert math.isnan(failed.seconds)
    assert all(isinstance(r.outcome, Instances) and r.image.shape == (20, 30, 3) for r in results.values())


def test_a_data_set_gives_its_predictions_in_order_and_its_failures(images):
    shown = []
    predictions = predict_dataset(Detector(refused=82), images, lambda image, sample, _: shown.append(sample.image_id))
    assert [p.image_id for p in predictions.instances] == shown == ["0", "1", "3"]
    assert list(predictions.failed) == ["2"]

    def broken(*_):
        raise ValueError("of the caller")

    # An error of the caller's own is no failure of an image.
    with pytest.raises(ValueError, match="of the caller"):
        predict_dataset(Detector(), images, broken)


def test_the_size_classes_are_cocos():
    ranges = dict(zip(("all", "small", "medium", "large"), Params(iouType="bbox").areaRng, strict=True))
    for name, (low, high) in SIZE_CLASSES.items():
        assert low == ranges[name][0]
        assert high == ranges[name][1] or (name == "large" and high == math.inf)
