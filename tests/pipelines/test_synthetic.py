"""The synthetic airfield: same bytes for the same seed, exact truth, difficulties present."""

import json

import numpy as np
import pytest

from models.errors import DataError
from models.geometry.rle import rle_boxes, rle_decode
from pipelines.data.readers.opening import open_dataset
from pipelines.data.synthetic.aircraft import draw_aircraft, random_aircraft
from pipelines.data.synthetic.scenes import AirfieldSettings, draw_scene, prepare_airfield

SMALL = AirfieldSettings(train=2, test=1, size=512, planes_min=6, planes_max=9)


def _content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name in ("a", "b"):
        assert prepare_airfield(tmp_path / name, SMALL)
    assert _content(tmp_path / "a") == _content(tmp_path / "b")
    assert not (
        draw_scene(SMALL, "train", 0).image == draw_scene(AirfieldSettings(size=512, seed=1), "train", 0).image
    ).all()


def test_a_second_call_reuses_and_an_interrupted_one_is_made_again(tmp_path):
    prepare_airfield(tmp_path / "a", SMALL)
    before = _content(tmp_path / "a")
    assert not prepare_airfield(tmp_path / "a", SMALL)
    # As a kill before the end leaves it: scenes, but no marker.
    for name in ("airfield.json", "train_coco.json", "test_coco.json"):
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / "train" / "A0001.png").write_bytes(b"half")
    assert prepare_airfield(tmp_path / "a", SMALL)
    assert _content(tmp_path / "a") == before


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty and not an airfield"):
        prepare_airfield(tmp_path, SMALL)
    prepare_airfield(tmp_path / "a", SMALL)
    with pytest.raises(DataError, match="other settings"):
        prepare_airfield(tmp_path / "a", AirfieldSettings(train=3, test=1, size=512))


def test_truth_is_complete_tight_and_without_overlap(airfield):
    for split in ("train", "test"):
        data = open_dataset(airfield, split)
        assert data.problems.summary() == ""
        assert data.has_masks
        for sample in data.samples:
            masks = np.array([rle_decode(m) for m in sample.masks])
            assert masks.sum(0).max() == 1
            assert np.allclose(sample.boxes, rle_boxes(sample.masks))


def test_the_mask_is_where_the_plane_changed_the_picture():
    rng = np.random.default_rng(0)
    patch = draw_aircraft(random_aircraft(rng), (100.3, 80.7), 70.0, 0.4, np.array([1.0, 0.0]))
    assert patch.mask.any()
    assert (patch.coverage[patch.mask] >= 0.5).all()
    # Rendering at four times the length and averaging down gives the same area.
    big = draw_aircraft(random_aircraft(np.random.default_rng(0)), (400.0, 320.0), 280.0, 0.4, np.array([1.0, 0.0]))
    assert patch.mask.sum() == pytest.approx(big.mask.sum() / 16, rel=0.05)


def test_scenes_have_many_sizes_and_colours(airfield):
    data = open_dataset(airfield, "train")
    sizes = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2]).max(1) for s in data.samples])
    assert sizes.min() < 35
    assert sizes.max() > 80
    colours = []
    for sample in data.samples:
        image = sample.read()
        colours += [image[rle_decode(m)].mean() for m in sample.masks]
    assert np.std(colours) > 15
    assert json.loads((airfield / "airfield.json").read_text())["size"] == 512
