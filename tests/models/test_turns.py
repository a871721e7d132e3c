"""Looks at a turned image: where their boxes and masks lie in the image as it was, and what is fused of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st

from models.geometry.boxes import box_iou
from models.geometry.rle import rle_boxes, rle_decode, rle_encode
from models.images.raster import WindowedImage
from models.images.rendering import Rendering
from models.images.windows import TurnedImage
from models.instances import Instances
from models.tiling.predictor import Tiled, by_tiles, network_of, tiling_of
from models.tiling.settings import Tiling
from models.tiling.turns import Turned, fused, looks_of, turned_back
from scoring.jobs.job import decisive_settings
from scoring.requests import JobSettings


def _image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class Painted:
    """Each colour above 0 of the first channel is a plane with a score of a hundredth of it; notes what it was given."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def predict(self, images):
        self.seen += images
        return [self._one(str(i), image) for i, image in enumerate(images)]

    def _one(self, image_id, image):
        colours = [c for c in np.unique(image[:, :, 0]) if c]
        masks = [rle_encode(image[:, :, 0] == c) for c in colours]
        scores = [c / 100 for c in colours]
        return Instances.make(image_id, *image.shape[:2], rle_boxes(masks), scores, masks=masks)


def _shapes(height: int, width: int) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[3:9, 5:31] = 90
    image[5:7, 10:15] = 0  # so that a mask is more than its box
    image[15:, 2:4] = 40
    image[12:20, 20] = 70
    return image


@pytest.mark.parametrize("turns", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(20, 34), (34, 34), (41, 33)])
def test_what_all_looks_agree_on_is_where_it_was(turns, size):
    image, right = _shapes(*size), Painted()
    [found] = Turned(Tiled(right, Tiling(size=48)), turns).predict([image])
    [alone] = Painted().predict([image])
    assert (found.height, found.width) == size
    np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-4)
    np.testing.assert_allclose(found.scores, alone.scores, atol=1e-6)
    for a, b in zip(found.masks, alone.masks, strict=True):
        assert np.array_equal(rle_decode(a), rle_decode(b))
    assert len({image.tobytes() for image in right.seen}) == turns


@given(st.integers(0, 2**32 - 1), st.sampled_from(looks_of(8)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_turning_back_undoes_the_turn(seed, look, size):
    """Against numpy: the pixels of a turned mask, brought back by numpy alone."""
    rng, (quarters, mirrored) = np.random.default_rng(seed), look
    mask = rng.random(size) < rng.choice([0, 0.1, 0.6])
    turned = np.rot90(mask[:, ::-1] if mirrored else mask, quarters)
    rle = rle_encode(turned)
    back = turned_back(Instances.make("0", *turned.shape, rle_boxes([rle]), [0.5], masks=[rle]), quarters, mirrored)
    assert np.array_equal(rle_decode(back.masks[0]), mask)
    assert (back.height, back.width) == size
    if mask.any():
        np.testing.assert_array_equal(back.boxes, rle_boxes([rle_encode(mask)]))


def _look(*rows, labels=None):
    return Instances.make("7", 100, 100, [r[:4] for r in rows], [r[4] for r in rows], labels=labels)


def test_boxes_become_their_mean_by_score_and_scores_that_of_all_looks():
    looks = [
        _look((10, 10, 30, 30, 0.9), (60, 60, 80, 80, 0.4)),
        _look((12, 10, 30, 32, 0.3)),
        _look((60, 62, 80, 80, 0.8)),
        _look(),
    ]
    found = fused(looks)
    assert found.image_id == "7"
    np.testing.assert_allclose(found.scores, [1.2 / 4, 1.2 / 4])
    first, second = found.boxes
    np.testing.assert_allclose(first, [(0.9 * 10 + 0.3 * 12) / 1.2, 10, 30, (0.9 * 30 + 0.3 * 32) / 1.2], atol=1e-5)
    np.testing.assert_allclose(second, [60, (0.4 * 60 + 0.8 * 62) / 1.2, 80, 80], atol=1e-5)


def test_classes_are_fused_apart_and_a_look_has_one_vote():
    one, other = _look((10, 10, 30, 30, 0.8), labels=[0]), _look((10, 10, 30, 30, 0.6), labels=[1])
    found = fused([one, other])
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.scores, [0.4, 0.3])
    twice = _look((10, 10, 30, 30, 0.8), (10, 10, 30, 31, 0.7))
    found = fused([twice, _look()])
    np.testing.assert_allclose(found.scores, [0.4])
    np.testing.assert_allclose(found.boxes, [[10, 10, 30, 30]])


def test_the_nearest_box_of_a_look_votes():
    found = fused([_look((10, 10, 30, 30, 0.9)), _look((10, 10, 30, 40, 0.8), (10, 10, 30, 31, 0.5))])
    np.testing.assert_allclose(found.scores[0], 1.4 / 2)
    np.testing.assert_allclose(found.boxes[0, 3], (0.9 * 30 + 0.5 * 31) / 1.4, atol=1e-5)
    assert len(found) == 1


def test_the_mask_is_that_of_the_best_look():
    masks = [rle_encode(np.pad(np.ones((k, 20), bool), ((10, 90 - k), (10, 70)))) for k in (20, 19)]
    looks = [
        Instances.make("0", 100, 100, [[10, 10, 30, 30]], [score], masks=[mask])
        for score, mask in zip((0.5, 0.7), masks, strict=True)
    ]
    assert fused(looks).masks == (masks[1],)


@given(st.integers(0, 2**32 - 1))
def test_no_box_is_lost_or_made_up(seed):
    rng = np.random.default_rng(seed)
    looks = []
    for _ in range(rng.integers(1, 5)):
        corner, count = rng.uniform(0, 60, (9, 2)), rng.integers(0, 10)
        boxes = np.concatenate([corner, corner + rng.uniform(0, 30, (9, 2))], axis=1)[:count]
        looks.append(Instances.make("0", 100, 100, boxes, rng.random(count), labels=rng.integers(0, 2, count)))
    found = fused(looks)
    everything = np.concatenate([i.boxes for i in looks])
    scores = np.concatenate([i.scores for i in looks])
    assert found.scores.sum() <= scores.sum() / len(looks) + 1e-4
    assert (found.scores <= scores.max(initial=0) + 1e-6).all()
    # Each box that was there overlaps the one that it went into, or is one itself; the best keeps its place.
    for box, score in zip(everything, scores, strict=True):
        near = box_iou(box[None], found.boxes)[0].max(initial=0)
        same = np.abs(found.boxes - box).max(axis=1, initial=0).min(initial=np.inf)
        assert near > 0 or same < 1e-3 or score == 0
    assert (found.scores[:-1] >= found.scores[1:]).all()


def test_nothing_found_is_nothing():
    found = fused([_look(), _look()])
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


@pytest.mark.parametrize(("turns", "full"), itertools.product([1, 2, 4, 8], [None, 64]))
def test_tiles_and_the_whole_image_are_turned(turns, full):
    calls = Painted()
    image = np.full((96, 80, 3), (0, 50, 60), np.uint8)
    image[::7, ::5, 1] = 9
    image[40:50, 33:60] = 90
    tiling = Tiling(size=64, overlap=0.5, turns=turns, full_image_size=full)
    predictor = by_tiles(calls, tiling, "cpu")
    assert tiling_of(predictor) == tiling
    assert network_of(predictor) is calls
    [found] = predictor.predict([image])
    whole = {x.tobytes() for x in calls.seen if x.shape[:2] != (64, 64)}
    assert len(whole) == (turns if full else 0)
    assert len({x.tobytes() for x in calls.seen if x.shape[:2] == (64, 64)}) >= 4 * turns
    np.testing.assert_allclose(found.boxes, [[33, 40, 60, 50]], atol=1e-3)
    np.testing.assert_allclose(found.scores, [0.9], atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from(looks_of(8)))
def test_a_turned_image_is_numpys(seed, look):
    rng, (quarters, mirrored) = np.random.default_rng(seed), look
    image = _image(seed, *rng.integers(1, 12, 2))
    view, whole = TurnedImage(image, quarters, mirrored), np.rot90(image[:, ::-1] if mirrored else image, quarters)
    assert view.shape == whole.shape
    y1, x1, y2, x2 = rng.integers(0, 15, 4)
    seen = view[y1:y2, x1:x2]
    assert np.array_equal(seen, whole[y1 : max(y1, y2), x1 : max(x1, x2)])
    assert seen.flags.c_contiguous
    assert np.array_equal(view.shrunk(*whole.shape[:2]), whole)


def test_a_large_file_is_turned_window_by_window(tmp_path):
    image = np.zeros((90, 130, 3), np.uint8)
    image[40:50, 33:60] = 90
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=130, height=90, count=3, dtype="uint8") as file:
        file.write(image.transpose(2, 0, 1))
    tiling = Tiling(size=64, overlap=0.5, turns=8, full_image_size=96)
    opened = WindowedImage(tmp_path / "a.tif", Rendering(range="depth"))
    [of_file], [of_array] = (by_tiles(Painted(), tiling, "cpu").predict([x]) for x in (opened, image))
    np.testing.assert_allclose(of_file.boxes, [[33, 40, 60, 50]], atol=1e-3)
    np.testing.assert_array_equal(of_file.boxes, of_array.boxes)
    np.testing.assert_array_equal(of_file.scores, of_array.scores)


def test_a_remote_file_that_changed_between_the_looks_is_told(monkeypatch):
    """Each look is checked, not the first alone."""
    image, checks = TurnedImage(np.zeros((40, 40, 3), np.uint8), 1, False), []
    monkeypatch.setattr(TurnedImage, "check", lambda self: checks.append(self.quarters))
    Turned(Tiled(Painted(), Tiling(size=48)), 4).predict([image.image])
    assert checks == [1, 2, 3]


def test_a_turned_file_is_checked_as_the_file_is(tmp_path, monkeypatch):
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=8, height=9, count=3, dtype="uint8") as file:
        file.write(np.ones((3, 9, 8), np.uint8))
    checked = []
    monkeypatch.setattr(WindowedImage, "check", lambda self: checked.append(self))
    TurnedImage(np.zeros((4, 4, 3), np.uint8), 1, False).check()
    image = WindowedImage(tmp_path / "a.tif")
    TurnedImage(image, 1, False).check()
    assert checked == [image]


def test_manifests_of_one_look_are_those_of_releases_that_knew_no_more():
    for turns, there in ((1, False), (4, True)):
        predictor = by_tiles(Painted(), Tiling(size=64, turns=turns), "cpu")
        decisive = decisive_settings(predictor, Rendering(), JobSettings(), "cpu")["tiling"]
        assert ("turns" in decisive) == there
        assert decisive["size"] == 64
