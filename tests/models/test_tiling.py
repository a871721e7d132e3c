"""Prediction by tiles, by a predictor that is always right about the planes of a tile."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.geometry.rle import rle_crop, rle_decode, rle_encode, rle_iou
from models.instances import Instances
from models.tiling.merging import TileResult, merge_tiles
from models.tiling.predictor import Tiled
from models.tiling.settings import Tiling, tile_grid

SIZE = 64


class Oracle:
    """Every connected patch brighter than 100 is a plane; its brightness is its score; its hue its class."""

    def __init__(self, masks: bool = True) -> None:
        self.masks, self.calls = masks, []

    def predict(self, images):
        self.calls.append(len(images))
        return [self._one(str(i), image) for i, image in enumerate(images)]

    def _one(self, image_id, image):
        height, width = image.shape[:2]
        boxes, scores, labels, masks = [], [], [], []
        for label in (0, 1):
            bright = (image[:, :, label] > 100).astype(np.uint8)
            count, components, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=4)
            for i in range(1, count):
                x, y, w, h, area = stats[i]
                if area < 2:
                    continue
                boxes.append([x, y, x + w, y + h])
                seen = components[y : y + h, x : x + w] == i
                # What is seen in part may score better than the whole.
                scores.append(float(image[y : y + h, x : x + w][seen][:, label].max()) / 255 + (0.001 if area < 300 else 0))
                labels.append(label)
                if self.masks:
                    mask = np.zeros((height, width), bool)
                    mask[y : y + h, x : x + w] = seen
                    masks.append(rle_encode(mask))
        return Instances.make(image_id, height, width, boxes, scores, labels=labels, masks=masks if self.masks else None)


def plane(height=24, width=30):
    """A plane-like cross, bool (height, width), every row and column touched."""
    mask = np.zeros((height, width), bool)
    mask[:, width // 2 - 3 : width // 2 + 3] = True
    mask[height // 2 - 3 : height // 2 + 3] = True
    return mask


def scene(height, width, planes, background=30):
    """An image with planes (top, left, mask, brightness, class), and the whole mask of each."""
    image = np.full((height, width, 3), background, np.uint8)
    image[::7, ::5] = background + 1
    truth = []
    for top, left, mask, bright, label in planes:
        whole = np.zeros((height, width), bool)
        whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        image[whole, label] = bright
        truth.append(whole)
    return image, truth


def check(instances, truth):
    assert len(instances) == len(truth), instances.boxes
    ious = rle_iou(list(instances.masks), [rle_encode(t) for t in truth])
    assert sorted(ious.argmax(axis=1).tolist()) == list(range(len(truth)))
    assert (ious.max(axis=1) == 1).all()
    for i, j in enumerate(ious.argmax(axis=1)):
        rows, columns = np.nonzero(truth[j])
        assert instances.boxes[i].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("merge", ["join", "nms"])
@pytest.mark.parametrize("match", ["iou", "ios"])
def test_a_plane_at_every_place_is_found_once_and_whole(merge, match):
    # Overlap of half a tile: every plane is whole in some tile, and cut in others.
    tiled = Tiled(Oracle(), Tiling(size=SIZE, overlap=0.5, merge=merge, match=match))
    for offset in range(70):
        image, truth = scene(160, 170, [(offset, 70 - offset + 20, plane(), 200, 0)])
        check(tiled.predict([image])[0], truth)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("match", ["iou", "ios"])
def test_a_plane_cut_by_every_border_is_joined(overlap, match):
    """Planes wider than the overlap, up to several tiles long, are whole in no tile."""
    tiled = Tiled(Oracle(), Tiling(size=SIZE, overlap=overlap, match=match))
    for shape in ((24, 30), (50, 60), (20, 190), (150, 150)):
        for offset in range(0, 64, 3):
            image, truth = scene(260, 280, [(offset, 64 - offset, plane(*shape), 200, 0)])
            check(tiled.predict([image])[0], truth)


def test_neighbours_and_classes_stay_apart():
    # Boxes that overlap by half, in one class and in two, on and off the borders.
    slash = np.eye(30, dtype=bool) | np.eye(30, k=1, dtype=bool) | np.eye(30, k=-1, dtype=bool)
    for offset in range(0, 60, 4):
        planes = [(20 + offset, 20, slash, 200, 0), (20 + offset, 30, slash, 150, 0), (60, 20 + offset, plane(), 220, 1)]
        image, truth = scene(170, 170, planes)
        instances = Tiled(Oracle(), Tiling(size=SIZE, overlap=0.5)).predict([image])[0]
        check(instances, truth)
        assert sorted(instances.labels.tolist()) == [0, 0, 1]


def test_one_tile_gives_what_the_predictor_gives():
    image, _ = scene(SIZE, SIZE, [(5, 5, plane(), 200, 0), (12, 30, plane(), 150, 0)])
    alone, tiled = Oracle().predict([image])[0], Tiled(Oracle(), Tiling(size=SIZE)).predict([image])[0]
    assert alone.boxes.tolist() == tiled.boxes.tolist()
    assert alone.scores.tolist() == tiled.scores.tolist()
    assert alone.masks == tiled.masks


def test_padding_and_batches_change_nothing():
    rng = np.random.default_rng(0)
    places = [(int(y), int(x)) for y in range(2, 220, 40) for x in range(2, 230, 42)]
    planes = [(y, x, plane(), int(rng.integers(120, 250)), int(rng.integers(2))) for y, x in places]
    image, truth = scene(260, 270, planes)
    padded = np.zeros((401, 333, 3), np.uint8)
    padded[:260, :270] = image
    settings = Tiling(size=SIZE, overlap=0.25)
    first = Tiled(Oracle(), settings).predict([image])[0]
    check(first, truth)
    for batch in (2, 5, 100):
        oracle = Oracle()
        results = Tiled(oracle, settings.model_copy(update={"batch": batch})).predict([image, padded])
        assert max(oracle.calls) == batch or batch == 100
        # Tiles of both images share batches: only the last one is not full.
        assert set(oracle.calls[:-1]) <= {batch}
        for instances in results:
            assert instances.boxes.tolist() == first.boxes.tolist()
            assert instances.scores.tolist() == first.scores.tolist()
            assert [rle_decode(m)[:260, :270].sum() for m in instances.masks] == [rle_decode(m).sum() for m in first.masks]


def test_tiles_of_one_colour_are_not_looked_at():
    oracle = Oracle()
    instances = Tiled(oracle, Tiling(size=SIZE)).predict(
        [np.zeros((300, 300, 3), np.uint8), np.full((10, 9, 3), 7, np.uint8)]
    )
    assert [len(f) for f in instances] == [0, 0]
    # The small one is gray in its ten rows and black beyond, so it is looked at.
    assert oracle.calls == [1]


class Shy(Oracle):
    """Sees nothing of a plane that the border cuts."""

    def _one(self, image_id, image):
        instances = super()._one(image_id, image)
        edge = (instances.boxes[:, :2] <= 0).any(axis=1) | (instances.boxes[:, 2:] >= image.shape[0]).any(axis=1)
        keep = np.flatnonzero(~edge)
        masks = [instances.masks[i] for i in keep]
        return Instances.make(image_id, *image.shape[:2], instances.boxes[keep], instances.scores[keep], masks=masks)


def test_a_pass_over_the_whole_image_finds_what_no_tile_shows():
    image, truth = scene(256, 256, [(40, 50, np.ones((120, 140), bool), 200, 0), (190, 20, plane(), 150, 0)])
    without = Tiled(Shy(), Tiling(size=SIZE, overlap=0.5)).predict([image])[0]
    assert len(without) == 1
    instances = Tiled(Shy(), Tiling(size=SIZE, overlap=0.5, full_image_size=128)).predict([image])[0]
    assert len(instances) == 2
    ious = rle_iou(list(instances.masks), [rle_encode(t) for t in truth])
    assert ious[0, 0] > 0.9
    assert ious[1, 1] == 1
    assert np.abs(instances.boxes[0] - [50, 40, 190, 160]).max() <= 3


def test_smaller_scales_find_what_no_tile_shows_and_larger_ones_what_is_too_small():
    image, truth = scene(256, 256, [(40, 50, np.ones((120, 140), bool), 200, 0), (190, 20, plane(), 150, 0)])
    tiled = Tiled(Shy(), Tiling(size=SIZE, overlap=0.5, zooms=(1, 0.25)))
    instances = tiled.predict([image])[0]
    assert len(instances) == 2
    ious = rle_iou(list(instances.masks), [rle_encode(t) for t in truth])
    assert ious[0, 0] > 0.9
    assert ious[1, 1] == 1

    class Coarse(Oracle):
        """Sees nothing of less than 20 pixels."""

        def _one(self, image_id, image):
            assert image.shape == (SIZE, SIZE, 3)
            instances = super()._one(image_id, image)
            sides = (instances.boxes[:, 2:] - instances.boxes[:, :2]).max(axis=1, initial=0)
            return instances.take(np.flatnonzero(sides >= 20))

    small, truth = scene(100, 100, [(30, 40, np.ones((12, 12), bool), 200, 0)])
    assert len(Tiled(Coarse(), Tiling(size=SIZE)).predict([small])[0]) == 0
    instances = Tiled(Coarse(), Tiling(size=SIZE, overlap=0.5, zooms=(1, 2))).predict([small])[0]
    assert len(instances) == 1
    assert np.abs(instances.boxes[0] - [40, 30, 52, 42]).max() <= 1
    assert rle_iou(list(instances.masks), [rle_encode(t) for t in truth])[0, 0] > 0.8


def test_a_scale_that_counts_less_outvotes_no_other():
    image, _ = scene(120, 120, [(40, 40, plane(), 200, 0), (80, 80, np.ones((8, 8), bool), 150, 0)])
    both = Tiled(Oracle(), Tiling(size=SIZE, overlap=0.5, zooms=(1, 2), zoom_weights=(1, 0.5))).predict([image])[0]
    alone = Tiled(Oracle(), Tiling(size=SIZE, overlap=0.5)).predict([image])[0]
    # What both scales see is as the first sees it.
    assert [b in both.boxes.tolist() for b in alone.boxes.tolist()] == [True] * len(alone)
    assert both.scores.max() == alone.scores.max()
    fine = Tiled(Oracle(), Tiling(size=SIZE, overlap=0.5, zooms=(2,), zoom_weights=(0.5,))).predict([image])[0]
    full = Tiled(Oracle(), Tiling(size=SIZE, overlap=0.5, zooms=(2,))).predict([image])[0]
    assert np.allclose(fine.scores, full.scores * 0.5)
    for wrong, said in (({"zooms": (1, 2), "zoom_weights": (1,)}, "1 for 2 zooms"), ({"zooms": (1, 1)}, "named twice")):
        with pytest.raises(ValueError, match=said):
            Tiling(**wrong)


def test_padding_and_batches_change_nothing_at_several_scales():
    places = [(int(y), int(x)) for y in range(2, 220, 40) for x in range(2, 230, 42)]
    image, _ = scene(260, 270, [(y, x, plane(), 120 + 2 * i, 0) for i, (y, x) in enumerate(places)])
    padded = np.zeros((401, 433, 3), np.uint8)
    padded[:260, :270] = image
    settings = Tiling(size=SIZE, overlap=0.25, zooms=(1, 0.5, 2))
    first = Tiled(Shy(), settings).predict([image])[0]
    assert len(first) >= len(places)
    for batch in (3, 100):
        for one in Tiled(Shy(), settings.model_copy(update={"batch": batch})).predict([image, padded]):
            assert one.boxes.tolist() == first.boxes.tolist()
            assert one.scores.tolist() == first.scores.tolist()


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(32, 200),
    st.floats(0, 0.9),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_the_grid_covers_and_does_not_move(height, width, size, overlap, more_rows, more_columns):
    tiling = Tiling(size=size, overlap=overlap)
    grid = tile_grid(height, width, tiling)
    covered = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in grid:
        assert (x2 - x1, y2 - y1) == (size, size)
        assert x1 < width
        assert y1 < height
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    assert set(grid) <= set(tile_grid(height + more_rows, width + more_columns, tiling))


def test_a_predictor_without_masks_gives_none():
    image, _ = scene(100, 100, [(5, 5, plane(), 200, 0)])
    assert Tiled(Oracle(masks=False), Tiling(size=SIZE)).predict([image])[0].masks is None
    empty = Tiled(Oracle(), Tiling(size=SIZE)).predict([scene(100, 100, [])[0]])[0]
    assert empty.masks == ()


def test_no_dense_mask_of_a_large_image_is_made():
    class Field:
        """13,000 x 13,000 pixels that exist only where they are looked at, a plane on every 1,900th."""

        shape = (13_000, 13_000, 3)
        planes = tuple((y, x) for y in range(40, 13_000, 1900) for x in range(60, 13_000, 1900))

        def __getitem__(self, key):
            rows, columns = key
            part = np.full((rows.stop - rows.start, columns.stop - columns.start, 3), 30, np.uint8)
            part[0, 0] = 31
            for y, x in self.planes:
                y1, y2, x1, x2 = (
                    max(y, rows.start),
                    min(y + 24, rows.stop),
                    max(x, columns.start),
                    min(x + 30, columns.stop),
                )
                if y1 < y2 and x1 < x2:
                    mask = plane()[y1 - y : y2 - y, x1 - x : x2 - x]
                    part[y1 - rows.start : y2 - rows.start, x1 - columns.start : x2 - columns.start, 0][mask] = 200
            return part

    tracemalloc.start()
    try:
        instances = Tiled(Oracle(), Tiling(size=1600, overlap=0.05)).predict([Field()])[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(instances.boxes.tolist()) == sorted([x, y, x + 30, y + 24] for y, x in Field.planes)
    for box, mask in zip(instances.boxes.astype(int), instances.masks, strict=True):
        part, left, top = rle_crop(mask)
        assert (left, top) == (box[0], box[1])
        assert (part == plane()).all()
    # One dense bool mask of the image alone would take 169 MB.
    assert peak < 100e6, peak


def test_the_score_is_that_of_the_best_whole_one():
    def merged(*instances):
        tile_results = [
            TileResult(Instances.make("0", 64, 64, [box], [score], labels=[0]), window) for box, score, window in instances
        ]
        tiling = Tiling(size=64, overlap=0.25, merge="nms", match="ios")
        return merge_tiles("0", 100, 100, tile_results, tiling=tiling).scores.tolist()

    here, below = (0, 0, 64, 64), (0, 8, 64, 72)
    assert merged(([20, 18, 44, 48], 0.625, here), ([20, 10, 44, 40], 0.75, below)) == [0.75]
    # What a border cuts may be surer than the whole.
    assert merged(([20, 24, 44, 64], 0.875, here), ([20, 16, 44, 60], 0.5, below)) == [0.5]


def test_no_box_lies_in_the_black_beyond_the_image():
    """A tile larger than the image is filled up with black, in which a predictor may see something."""

    class Everywhere:
        def predict(self, images):
            boxes, scores = [[2, 2, 12, 12], [40, 40, 60, 60], [15, 15, 30, 30]], [0.9, 0.8, 0.7]
            return [Instances.make(str(i), *image.shape[:2], boxes, scores) for i, image in enumerate(images)]

    image = np.full((20, 20, 3), 90, np.uint8)
    instances = Tiled(Everywhere(), Tiling(size=64)).predict([image])[0]
    assert instances.boxes.tolist() == [[2, 2, 12, 12], [15, 15, 20, 20]]


def test_a_mask_in_the_black_beyond_the_image_is_empty():
    mask = np.zeros((64, 64), bool)
    mask[50:60, 52:62] = True
    shown = Instances.make("0", 64, 64, [[20, 20, 62, 60]], [0.9], masks=[rle_encode(mask)])
    merged = merge_tiles("0", 40, 45, [TileResult(shown, (0, 0, 64, 64))], tiling=Tiling(size=64))
    assert merged == Instances.make("0", 40, 45, [[20, 20, 45, 40]], [0.9], masks=[rle_encode(np.zeros((40, 45)))])


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_the_last_batch_may_hold_a_single_tile(batch):
    class Each:
        def predict(self, images):
            return [Instances.make(str(i), *m.shape[:2], [[20, 20, 40, 40]], [0.9]) for i, m in enumerate(images)]

    image = np.random.default_rng(0).integers(0, 255, (64, 192, 3)).astype(np.uint8)
    assert len(Tiled(Each(), Tiling(size=64, overlap=0, batch=batch)).predict([image])[0]) == 3
