"""A promotion over images of which some fail: they count, for the version that they fail for, and the table says it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.errors import DataError, ModelError
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.side_by_side import measure, slowdown
from pipelines.registry.gates import Gates, judge
from tests.scoring.test_failed_images import Finder, _set


def _items(items, *_):
    return items


@pytest.fixture
def dataset(tmp_path):
    """Five images of widths 80 to 84, the fourth missing."""
    folder = _set(tmp_path)
    (folder / "test" / "3.png").unlink()
    return open_dataset(folder, "test", keep=True)


def test_an_image_fails_for_the_version_that_cannot_take_it(dataset):
    measured = measure({"new": Finder(broken=(81,)), "old": Finder()}, dataset, _items)
    assert [sorted(measured[k].failed) for k in ("new", "old")] == [["1", "3"], ["3"]]
    assert [round(measured[k].metrics["AP50"], 2) for k in ("new", "old")] == [0.6, 0.8]
    assert [math.isnan(s) for s in measured["new"].seconds] == [False, True, False, True, False]
    assert measured["new"].evaluation.metrics["images_failed"] == 2
    assert measured["new"].evaluation.settings["images_failed"] == 2
    (check, gain) = judge(Gates(metrics={"AP": {"min_gain": 0}}), "AP", measured["new"], measured["old"])
    assert (check.gate, check.candidate, check.baseline, check.passed) == ("images that failed", "2", "1", True)
    assert not gain.passed
    (alone, _) = judge(Gates(metrics={"AP": {"min_gain": 0}}), "AP", measured["new"], None)
    assert (alone.candidate, alone.baseline) == ("2", "-")


def test_no_row_where_none_failed(dataset):
    whole = dataset.subset(["0", "1"], "test")
    measured = measure({"new": Finder()}, whole, _items)["new"]
    assert [c.gate for c in judge(Gates(metrics={"AP": {"minimum": 0}}), "AP", measured, None)] == ["AP"]
    assert measured.evaluation.metrics["images_failed"] == 0


def test_times_are_held_against_each_other_where_both_have_one(dataset):
    measured = measure({"new": Finder(broken=(81,)), "old": Finder(broken=(84,))}, dataset, _items)
    assert math.isfinite(slowdown(measured["new"], measured["old"]))
    apart = measure({"new": Finder(broken=(80, 81)), "old": Finder(broken=(82, 84))}, dataset, _items)
    assert math.isnan(slowdown(apart["new"], apart["old"]))
    (_, time) = judge(Gates(max_slowdown=2), "AP", apart["new"], apart["old"])
    assert (time.passed, time.candidate) == (False, "cannot be measured")


def test_a_version_that_takes_no_image_ends_the_promotion(dataset):
    with pytest.raises(DataError, match=r"new: none of 5 images could be predicted; the first: .*MemoryError"):
        measure({"new": Finder(broken=range(80, 85)), "old": Finder()}, dataset, _items)


@pytest.mark.parametrize("error", [ModelError("broken weights"), RuntimeError("CUDA error: device-side assert")])
def test_a_model_that_cannot_work_at_all_ends_it_at_once(dataset, error):
    class Broken:
        def predict(self, images):
            raise error

    with pytest.raises(type(error)):
        measure({"new": Broken()}, dataset, _items)


def test_what_failed_is_tried_again_by_a_call_that_goes_on(dataset, tmp_path):
    kept = tmp_path / "kept.jsonl"
    first = measure({"new": Finder(broken=(81,))}, dataset, _items, kept=kept)["new"]
    assert len(first.failed) == 2
    seen = []

    class Counting(Finder):
        def predict(self, images):
            seen.append(images[0].shape[1])
            return super().predict(images)

    again = measure({"new": Counting()}, dataset, _items, kept=kept)["new"]
    assert seen == [81]
    assert list(again.failed) == ["3"]


def test_an_image_without_planes_that_fails_costs_nothing(tmp_path):
    folder = _set(tmp_path)
    data = open_dataset(folder, "test", keep=True)
    measured = measure({"new": Finder()}, data, _items)["new"]
    assert measured.metrics["AP"] == pytest.approx(1.0)
    assert isinstance(measured.predictions[0], Instances)
    assert np.isfinite(measured.seconds).all()
