"""The split never parts a scene and does not depend on order."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import DataError
from pipelines.data.dataset import Dataset, Sample, split_by_scene
from pipelines.data.opening import open_dataset


def _dataset(scenes):
    samples = [
        Sample(f"{scene}_{i}", Path("x"), 8, 8, scene, np.zeros((0, 4), np.float32), (), np.zeros(0, bool))
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
    assert len(val) >= 0.2 * len(data)
