"""Tiles to train on: planes clipped exactly, the right tiles kept, the same on the fly and from files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from models.errors import DataError, RecipeError
from models.geometry.rle import rle_bytes, rle_crop, rle_encode, rle_from_polygons
from pipelines.data.loading.augment import Augmentation
from pipelines.data.loading.batches import DetectorBatches
from pipelines.data.loading.cache import ImageCache
from pipelines.data.loading.tiles import TileSettings, cached_tiles, clip_mask, cut_tiles
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.training.loop import step_loader

PLAIN = Augmentation(mirror=False, quarter_turns=False)


def _padded(dense, window):
    x1, y1, x2, y2 = window
    big = np.zeros((max(y2, dense.shape[0]), max(x2, dense.shape[1])), np.uint8)
    big[: dense.shape[0], : dense.shape[1]] = dense
    return big[y1:y2, x1:x2]


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_masks_are_clipped_as_pycocotools_would(seed, polygon):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 90, 2).tolist()
    if polygon:
        # Any polygon, crossing itself or not, partly outside; drawn as COCO draws it.
        points = rng.uniform(-10, 100, (int(rng.integers(3, 9)), 2))
        rle = rle_from_polygons([points.ravel().tolist()], height, width)
    else:
        rle = rle_encode(rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98]))
    x1, y1 = (int(rng.integers(0, extent)) for extent in (width, height))
    side = int(rng.integers(1, 60))
    window = (x1, y1, x1 + side, y1 + side)
    expected = _padded(coco_mask.decode(rle_bytes(rle)), window)
    clipped = clip_mask(rle_crop(rle), window)
    assert clipped["size"] == [side, side]
    assert clipped["counts"] == rle_encode(expected)["counts"]


def test_tiles_show_what_the_images_show(airfield):
    dataset = open_dataset(airfield, "train")
    settings = TileSettings(size=200, overlap=0.2, empty=1.0)
    tiles = cut_tiles(dataset, settings, min_visible=0.3)
    samples = {s.image_id: s for s in dataset.samples}
    seen = 0
    for tile in tiles.samples:
        source = samples[tile.image_id.rsplit("_", 2)[0]]
        x1, y1, x2, y2 = tile.window
        image = source.read()
        shown = image[y1:y2, x1:x2]
        pixels = tile.read()
        assert pixels.shape == (200, 200, 3)
        assert (pixels[: shown.shape[0], : shown.shape[1]] == shown).all()
        assert not pixels[shown.shape[0] :].any()
        assert not pixels[:, shown.shape[1] :].any()
        wholes = [coco_mask.decode(rle_bytes(m)) for m in source.masks]
        expected = [_padded(w, tile.window) for w in wholes]
        kept = [e for w, e in zip(wholes, expected, strict=True) if e.sum() >= 0.3 * w.sum()]
        assert [m["counts"] for m in tile.masks] == [rle_encode(e)["counts"] for e in kept]
        for box, mask in zip(tile.boxes, kept, strict=True):
            rows, columns = np.nonzero(mask)
            assert box[0] <= columns.min() + 1
            assert box[3] >= rows.max()
        seen += len(kept)
    assert seen > dataset.planes


def test_how_many_empty_tiles_and_which_slivers_are_kept(airfield):
    dataset = open_dataset(airfield, "train")

    def cut(empty, min_visible=0.3, seed=0):
        tiles = cut_tiles(dataset, TileSettings(size=128, empty=empty), min_visible, seed)
        return {t.image_id for t in tiles.samples if not len(t.boxes)}, {t.image_id for t in tiles.samples if len(t.boxes)}

    none, full = cut(0.0)
    every, same = cut(1.0)
    some, _ = cut(0.4)
    assert not none
    assert same == full
    assert some < every
    assert 0.25 < len(some) / len(every) < 0.55
    assert some == cut(0.4)[0] != cut(0.4, seed=1)[0]
    # A tile that shows half a plane alone is neither empty nor annotated when the whole is asked for.
    strict_empty, strict_full = cut(1.0, min_visible=1.0)
    assert strict_full < full
    assert strict_empty == every
    with pytest.raises(DataError, match="no tile of 32 pixels shows 1 of a plane"):
        cut_tiles(dataset.subset([dataset.samples[0].image_id], "x"), TileSettings(size=32), 1.0)


def test_boxes_alone_are_clipped_too(airfield):
    dataset = open_dataset(airfield, "train")
    bare = replace(dataset, samples=tuple(replace(s, masks=(None,) * len(s.boxes)) for s in dataset.samples))
    for tile in cut_tiles(bare, TileSettings(size=128, overlap=0.5, empty=0), 0.5).samples:
        assert (tile.boxes >= 0).all()
        assert (tile.boxes <= 128).all()
        assert len(tile.boxes)


def test_cached_tiles_have_the_same_pixels_and_survive_a_stop(airfield, tmp_path):
    tiles = cut_tiles(open_dataset(airfield, "train"), TileSettings(size=200), 0.3)
    done = []

    def stopping(samples, total, title):
        for sample in samples:
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(sample)
            yield sample

    with pytest.raises(KeyboardInterrupt):
        cached_tiles(tiles, tmp_path / "t", stopping)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "t").glob("*.png")}
    assert len(stamps) == 3
    cached = cached_tiles(tiles, tmp_path / "t", lambda samples, *_: samples)
    assert all((tmp_path / "t" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    for one, other in zip(tiles.samples, cached.samples, strict=True):
        assert (one.read() == other.read()).all()
    batches = [
        DetectorBatches(d, PLAIN, batch_size=2, window=None, focus=0.8, min_visible=0.3, seed=0) for d in (tiles, cached)
    ]
    for step in range(3):
        for one, other in zip(batches[0][step], batches[1][step], strict=True):
            assert one.boxes.tolist() == other.boxes.tolist()
            assert (one.image == other.image).all()


def test_an_image_is_decoded_once_for_all_its_tiles(airfield, monkeypatch):
    tiles = cut_tiles(open_dataset(airfield, "train"), TileSettings(size=128), 0.3)
    opened = []
    from pipelines.data.loading import cache

    real = cache.open_image
    monkeypatch.setattr(cache, "open_image", lambda path, *how: opened.append(path) or real(path, *how))
    memory = ImageCache()
    for tile in tiles.samples:
        assert (memory.read(tile) == tile.read()).all()
    assert len(opened) == len(set(opened)) == 5


def test_the_cache_keeps_what_was_read_last_up_to_its_limit(airfield, monkeypatch):
    samples = open_dataset(airfield, "train").samples[:3]
    opened = []
    from pipelines.data.loading import cache

    real = cache.open_image
    monkeypatch.setattr(cache, "open_image", lambda path, *how: opened.append(path) or real(path, *how))
    bytes_each = samples[0].read().nbytes

    def opened_by(limit, order):
        opened.clear()
        memory = ImageCache(limit)
        for i in order:
            assert (memory.read(samples[i]) == samples[i].read()).all()
        return [i for path in opened for i, sample in enumerate(samples) if sample.path == path]

    assert opened_by(2 * bytes_each, [0, 1, 0, 2, 0, 1]) == [0, 1, 2, 1]
    assert opened_by(3 * bytes_each, [0, 1, 2, 0, 1, 2]) == [0, 1, 2]
    # An image above the limit is kept, alone.
    assert opened_by(bytes_each // 2, [0, 0, 1, 1, 0]) == [0, 1, 0]


def test_recipe_entries_of_tiles(tmp_path):
    recipe = load_recipe("demo_detector", ["window=null", "tiles.size=256", "tiles.overlap=0.3"])
    assert recipe.prediction.size == 256
    assert recipe.prediction.overlap == 0.3
    assert load_recipe("demo_detector").prediction is None
    assert load_recipe("demo_detector", ["tiling.size=640"]).prediction.size == 640
    with pytest.raises(RecipeError, match="window and tiles exclude each other"):
        load_recipe("demo_detector", ["tiles.size=256"])
    with pytest.raises(RecipeError, match=r"unknown key 'tiles\.sise'; did you mean 'tiles\.size'"):
        load_recipe("demo_detector", ["window=null", "tiles.sise=256"])


def test_processes_that_prepare_batches_share_the_memory():
    class Caches:
        def __init__(self):
            self.cache = ImageCache(1000)

        def __len__(self):
            return 1

        def __getitem__(self, step):
            return self.cache._decoded.maxsize

    sizes = {workers: [*step_loader(Caches(), 0, 2, workers)] for workers in (0, 2)}
    assert sizes == {0: [1000, 1000], 2: [500, 500]}
