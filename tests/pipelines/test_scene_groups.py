"""Scenes that show the same ground stay together, and folds part scenes, never images of one."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.data.readers.annotations import make_sample
from pipelines.data.readers.opening import open_dataset
from pipelines.data.scene_groups import scene_folds, with_joined_scenes
from pipelines.data.synthetic.scenes import AirfieldSettings, draw_scene


def _dataset(folder, images, scenes=None):
    samples = []
    for number, (name, image) in enumerate(images.items()):
        path = folder / name
        if image is not None:
            cv2.imwrite(str(path), image)
        scene = scenes[number] if scenes else path.stem
        shape = (10, 10) if image is None else image.shape[:2]
        samples.append(make_sample(path.stem, path, shape, scene, []))
    return Dataset("d", folder, "all", "plane", tuple(samples))


def _ground(seed, size=900):
    return cv2.cvtColor(draw_scene(AirfieldSettings(size=size, seed=seed), "train", 0).image, cv2.COLOR_RGB2BGR)


def _scenes(dataset):
    return {s.image_id: s.scene for s in with_joined_scenes(dataset).samples}


def test_parts_of_one_ground_are_joined_whatever_they_are_called(tmp_path):
    ground, other = _ground(1), _ground(2)
    turned = cv2.rotate(ground[300:900, 200:800], cv2.ROTATE_90_CLOCKWISE)
    found = _scenes(
        _dataset(tmp_path, {"a.png": ground[:600, :600], "b.png": turned, "c.png": other[:600, :600], "gone.png": None})
    )
    assert found == {"a": "a+b", "b": "a+b", "c": "c", "gone": "gone"}


def test_names_that_tell_no_scene_are_a_warning_where_images_overlap(tmp_path, caplog):
    ground, other = _ground(1), _ground(2)
    images = {"P00220.png": ground[:600, :600], "P00221.png": ground[300:900, 200:800], "P00230.png": other[:600, :600]}
    with_joined_scenes(_dataset(tmp_path, images))
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "2 of 3 images show ground that another one shows" in record.message
    assert "data.scene_pattern" in record.message
    caplog.clear()
    with caplog.at_level("INFO"):
        with_joined_scenes(_dataset(tmp_path, images, ["P0022", "P0022", "P0023"]))
    assert not caplog.records
    # Names that tell scenes, of which two show one place.
    more = images | {"P00231.png": other[300:900, :600]}
    with_joined_scenes(_dataset(tmp_path, more, ["P0022", "P0024", "P0023", "P0023"]))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    # One whose name looks like that of two.
    with caplog.at_level("INFO"):
        with_joined_scenes(_dataset(tmp_path, {"P00220+1.png": ground[:600, :600], "P00230.png": other[:600, :600]}))
    assert [(r.levelname, "every image is a scene of its own" in r.message) for r in caplog.records] == [("INFO", True)]


def test_near_duplicates_are_joined_and_pale_images_are_not(tmp_path):
    ground = cv2.GaussianBlur(_ground(3), (0, 0), 12)
    again = np.clip(ground * 0.95 + 8, 0, 255).astype(np.uint8)
    flat = {"c.png": np.full((90, 90, 3), 200, np.uint8), "d.png": np.full((90, 90, 3), 201, np.uint8)}
    # Two of open water, alike in that one corner is a little darker.
    slope = np.add.outer(np.arange(90), np.arange(90))[:, :, None] / 60
    flat |= {"f.png": (150 + slope * [1, 1, 1]).astype(np.uint8), "g.png": (90 + slope * [1, 1, 1]).astype(np.uint8)}
    cv2.imwrite(str(tmp_path / "b.jpg"), again)
    found = _scenes(_dataset(tmp_path, {"a.png": ground, "b.jpg": again, **flat, "e.png": ground[::-1].copy()}))
    assert found == {"a": "a+b", "b": "a+b", **{name: name for name in "cdefg"}}


def test_images_whose_coordinates_meet_are_joined(tmp_path):
    samples = []
    for name, left in (("a", 0), ("b", 90), ("c", 300)):
        noise = np.random.default_rng(left).integers(0, 255, (3, 100, 100), dtype=np.uint8)
        place = rasterio.transform.from_origin(500_000 + left, 4_000_000, 1, 1)
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", height=100, width=100, count=3, dtype="uint8",
            crs="EPSG:32631", transform=place,
        ) as file:  # fmt: skip
            file.write(noise)
        samples.append(make_sample(name, tmp_path / f"{name}.tif", (100, 100), name, []))
    assert _scenes(Dataset("d", tmp_path, "all", "plane", tuple(samples))) == {"a": "a+b", "b": "a+b", "c": "c"}


def test_a_chain_of_overlaps_is_one_scene(tmp_path):
    ground = _ground(4, 1400)
    parts = {f"{n}.png": ground[:700, x : x + 600] for n, x in (("a", 0), ("b", 300), ("c", 600))}
    assert set(_scenes(_dataset(tmp_path, parts)).values()) == {"a+b+c"}


@pytest.mark.parametrize("pair", [("P0022", "P0023"), ("P0171", "P0172")])
def test_real_scenes_side_by_side_stay_apart(dota, pair):
    tiles = open_dataset(dota, "train", scene_pattern=r"^(P\d{4})")
    samples = [s for s in tiles.samples if s.scene in pair]
    found = with_joined_scenes(Dataset("d", tiles.source, "all", "plane", tuple(samples)))
    assert [s.scene for s in found.samples] == [s.scene for s in samples]
    # Without the pattern each tile is a scene, and those that share ground are joined by it.
    alone = [replace(s, scene=s.image_id) for s in samples]
    found = with_joined_scenes(Dataset("d", tiles.source, "all", "plane", tuple(alone)))
    assert max(s.scene.count("+") for s in found.samples) >= 1


def _listed(sizes):
    samples = [
        make_sample(f"{scene}-{i}", "nowhere.png", (9, 9), f"s{scene}", [])
        for scene, n in enumerate(sizes)
        for i in range(n)
    ]
    return Dataset("d", samples[0].path, "all", "plane", tuple(samples))


@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.integers(2, 3), st.randoms())
@settings(deadline=None, max_examples=30)
def test_folds_part_scenes_and_do_not_depend_on_the_order(sizes, count, random):
    dataset = _listed(sizes)
    folds = scene_folds(dataset, count)
    ids = [s.image_id for fold in folds for s in fold.samples]
    assert sorted(ids) == sorted(s.image_id for s in dataset.samples)
    scenes = [{s.scene for s in fold.samples} for fold in folds]
    assert all(scenes)
    assert sum(len(s) for s in scenes) == len(set.union(*scenes))
    assert [fold.split for fold in folds] == [f"fold-{k}" for k in range(1, count + 1)]
    # The largest scene goes to the emptiest fold: no two folds differ by more than it.
    assert max(map(len, folds)) - min(map(len, folds)) <= max(sizes)
    mixed = list(dataset.samples)
    random.shuffle(mixed)
    again = scene_folds(Dataset("d", dataset.source, "all", "plane", tuple(mixed)), count)
    assert [{s.image_id for s in a.samples} for a in again] == [{s.image_id for s in f.samples} for f in folds]


def test_too_few_scenes_are_said():
    with pytest.raises(DataError, match="3 scenes cannot make 5 folds; give --folds 3 or fewer"):
        scene_folds(_listed([4, 4, 4]), 5)
    with pytest.raises(DataError, match=r"one scene cannot make folds; data\.scene_pattern tells scenes apart"):
        scene_folds(_listed([4]), 2)
