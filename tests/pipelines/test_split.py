"""The split never divides a scene and does not depend on order."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import DataError
from pipelines.data.dataset import Dataset, Sample, scene_of, split_by_scene
from pipelines.data.readers.opening import open_dataset


def _dataset(scenes):
    samples = [
        Sample(
            f"{scene}_{i}",
            Path("x"),
            height=8,
            width=8,
            scene=scene,
            boxes=np.zeros((0, 4), np.float32),
            masks=(),
            crowd=np.zeros(0, bool),
        )
        for i, scene in enumerate(scenes)
    ]
    return Dataset("d", Path("d"), "train", "plane", tuple(samples))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40), st.floats(0, 0.9), st.integers(0, 5))
def test_scenes_stay_together_and_nothing_is_lost(scenes, fraction, seed):
    data = _dataset(scenes)
    if len(set(scenes)) < 2 and fraction > 0:
        with pytest.raises(DataError, match="val_fraction"):
            split_by_scene(data, fraction, seed)
        return
    train, val = split_by_scene(data, fraction, seed)
    assert {s.scene for s in train.samples}.isdisjoint({s.scene for s in val.samples})
    assert sorted(s.image_id for s in (*train.samples, *val.samples)) == sorted(s.image_id for s in data.samples)
    assert len(train) > 0
    assert (len(val) > 0) == (fraction > 0)


def test_order_of_files_does_not_matter_but_the_seed_does():
    data = _dataset([f"s{i}" for i in range(40)])
    reverse = replace(data, samples=data.samples[::-1])
    chosen = {s.image_id for s in split_by_scene(data, 0.25, 1)[1].samples}
    assert chosen == {s.image_id for s in split_by_scene(reverse, 0.25, 1)[1].samples}
    assert chosen != {s.image_id for s in split_by_scene(data, 0.25, 2)[1].samples}
    assert len(chosen) == 10


def test_tiles_of_real_scenes_stay_together(dota):
    data = open_dataset(dota, "train", scene_pattern=r"^P(\d{4})")
    train, val = split_by_scene(data, 0.2, 0)
    assert {s.image_id[:5] for s in train.samples}.isdisjoint({s.image_id[:5] for s in val.samples})
    assert abs(len(val) - 0.2 * len(data)) <= 2


def test_the_scenes_that_come_nearest_are_chosen():
    """Scenes of 90 and 10 images, 0.15: the small one, in whatever order they come."""
    for seed in range(6):
        train, val = split_by_scene(_dataset(["a"] * 90 + ["b"] * 10), 0.15, seed)
        assert (len(train), len(val)) == (90, 10)
        _, val = split_by_scene(_dataset(["a"] * 70 + ["b"] * 18 + ["c"] * 8 + ["d"] * 4), 0.12, seed)
        assert 8 <= len(val) <= 18
        # Where all are too large, the smallest.
        assert len(split_by_scene(_dataset(["a"] * 60 + ["b"] * 40), 0.1, seed)[1]) == 40


def test_a_scene_more_moves_few_others():
    scenes = [f"s{i}" for i in range(50)]
    before = {s.scene for s in split_by_scene(_dataset(scenes), 0.2, 0)[1].samples}
    after = {s.scene for s in split_by_scene(_dataset([*scenes, "new"]), 0.2, 0)[1].samples}
    assert len(before ^ after) <= 2


def test_the_split_is_linear_in_the_images():
    """200,000 samples in seconds, where each was once looked for in a set made anew for it."""
    few, many = (_dataset([f"s{i % 1000}" for i in range(n)]) for n in (2_000, 200_000))
    split_by_scene(few, 0.2, 0)
    counted = Counted(many.samples)
    train, val = split_by_scene(replace(many, samples=counted), 0.2, 0)
    assert len(train) + len(val) == 200_000
    assert counted.passes <= 4


class Counted(tuple):
    """Samples that count how often all of them are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_a_pattern_that_is_none_is_said():
    with pytest.raises(DataError, match=r"scene pattern '\^P\(': is no regular expression"):
        scene_of("P0001", "^P(")
