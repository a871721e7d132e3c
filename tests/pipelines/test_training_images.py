"""A version is not judged on images that it was trained on, whatever they are called and wherever they lie."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from pipelines.data.dataset import split_by_scene
from pipelines.data.loading.tiles import TileSettings, cut_tiles
from pipelines.data.readers.opening import open_dataset
from pipelines.registry.gates import judge_images
from pipelines.registry.training_images import TrainingImages, images_of, united


@pytest.fixture
def field(airfield):
    """The airfield's training and test split."""
    return open_dataset(airfield, "train"), open_dataset(airfield, "test")


def test_training_images_are_found_in_the_whole_split(field):
    """Validation is split off before training: neither part is the split, both are leaks."""
    full, test = field
    train, val = split_by_scene(full, 0.3, 0)
    assert len(train) < len(full)
    known = images_of(train, val)
    (check,) = judge_images([full], known)
    assert not check.passed
    assert check.candidate == f"5 of 5 (first: {full.samples[0].image_id})"
    (check,) = judge_images([test], known)
    assert (check.passed, check.candidate) == (True, "0 of 2")
    assert not judge_images([test, full], images_of(train, None))[1].passed


def test_one_image_under_another_name_is_enough(field, airfield, tmp_path):
    full, _ = field
    for name in ("test", "test_coco.json"):
        copy = shutil.copytree if (airfield / name).is_dir() else shutil.copy
        copy(airfield / name, tmp_path / name)
    shutil.copy(full.samples[2].path, tmp_path / "test" / "A0006.png")
    gate = open_dataset(tmp_path, "test")
    assert gate.digest() != full.digest()
    (check,) = judge_images([gate], images_of(full))
    assert (check.passed, check.candidate) == (False, "1 of 2 (first: A0006)")


def test_tiles_count_as_their_image(field):
    full, test = field
    tiles = cut_tiles(full, TileSettings(size=256), 0.3)
    assert images_of(tiles).images.keys() <= images_of(full).images.keys()
    assert not judge_images([full], images_of(tiles))[0].passed
    assert judge_images([test], images_of(tiles))[0].passed


def test_a_composition_has_the_images_of_its_parts(field):
    full, test = field
    both = united({"detector a/1": images_of(full), "segmenter b/1": images_of(test)})
    assert len(both.images) == 7
    assert [c.passed for c in judge_images([full, test], both)] == [False, False]
    half = united({"detector a/1": images_of(full), "segmenter b/1": None})
    (check,) = judge_images([test], half)
    assert (check.passed, check.candidate) == (True, "0 of 2; not known of segmenter b/1")
    again = united({"x": half})
    assert again.unknown == ["segmenter b/1"]


def test_what_is_not_known_is_said(field):
    full, test = field
    (check,) = judge_images([test], None, data_digest=full.digest())
    assert check.passed
    assert "not known" in check.candidate
    # All that 0.6.0 noted is the digest of the training set, without validation.
    assert not judge_images([full], None, data_digest=full.digest())[0].passed


def test_a_baseline_that_knows_the_images_is_named(field):
    full, test = field
    (check,) = judge_images([test], images_of(full), images_of(test))
    assert (check.passed, check.baseline) == (True, "2 of 2 (first: A0005)")
    assert judge_images([test], images_of(full), TrainingImages())[0].baseline == "-"


def test_images_that_cannot_be_read_are_no_leak(field, tmp_path):
    full, _ = field
    gone = replace(full, samples=tuple(replace(s, path=tmp_path / s.path.name) for s in full.samples))
    assert images_of(gone).images == {}
    assert judge_images([gone], images_of(full))[0].passed
