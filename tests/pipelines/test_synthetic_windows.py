"""Drawn airfields among the windows of a training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from models.errors import RecipeError
from pipelines.data.loading.augment import Augmentation
from pipelines.data.loading.batches import DetectorBatches, OtherWindows
from pipelines.data.readers.opening import open_dataset
from pipelines.data.synthetic.aircraft import random_aircraft
from pipelines.data.synthetic.scenes import AirfieldSettings, draw_scene, prepare_airfield
from pipelines.recipes.reading import load_recipe
from pipelines.training.detector import train_detector
from pipelines.training.synthetic import draw_scenes, drawn_windows

PLAIN = Augmentation(mirror=False, quarter_turns=False)
TINY = ("synthetic.share=0.3", "synthetic.scenes=2", "synthetic.lengths=[18,40]")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "a"
    prepare_airfield(folder, AirfieldSettings(train=3, test=0, size=256, planes_min=4, planes_max=6, length_max=40))
    return open_dataset(str(folder), "train")


def _batches(data, **changes):
    settings = {"batch_size": 4, "window": 64, "focus": 1.0, "min_visible": 0.3, "seed": 7}
    return DetectorBatches(data, PLAIN, **settings | changes)


def test_a_share_of_the_windows_is_of_the_other_data_set_at_its_scale(airfield, drawn):
    data = open_dataset(str(airfield), "train")
    mixed = _batches(data, other=OtherWindows(drawn, 0.4, 0.5), zoom=2.0)
    own, plain = _batches(drawn, zoom=0.5), _batches(data, zoom=2.0)
    of_drawn, count = 0, 0
    for step in range(40):
        for i, example in enumerate(mixed[step]):
            rng = np.random.default_rng([7, 2, step, i])
            if rng.random() < 0.4:
                expected = own._example(int(rng.integers(len(drawn))), rng)
                np.testing.assert_array_equal(example.image, expected.image)
                np.testing.assert_array_equal(example.boxes, expected.boxes)
                of_drawn += 1
            count += 1
    assert 0.25 < of_drawn / count < 0.55
    # An epoch is one over the data's own images, and nothing changes where nothing is mixed in.
    assert len(mixed) == len(plain)
    assert all(
        np.array_equal(a.image, b.image) for a, b in zip(plain[3], _batches(data, zoom=2.0, other=None)[3], strict=True)
    )


def test_the_same_step_is_the_same_batch_whichever_process_makes_it(airfield, drawn):
    data = open_dataset(str(airfield), "train")
    one = _batches(data, other=OtherWindows(drawn, 0.5, 1.0), masks=True)
    other = _batches(data, other=OtherWindows(drawn, 0.5, 1.0), masks=True)
    for step in (5, 0, 5):
        whole = one[step]
        parts = [other.share(step, rank, 2) for rank in (0, 1)]
        for example, again in zip(whole, [parts[0][0], parts[1][0], parts[0][1], parts[1][1]], strict=True):
            np.testing.assert_array_equal(example.image, again.image)
            np.testing.assert_array_equal(example.masks, again.masks)


def test_scenes_are_drawn_once_for_all_trainings_of_the_same_settings(tmp_path):
    recipe = load_recipe("detector_scratch", TINY)
    for name in ("one", "two"):
        draw_scenes(recipe, tmp_path / name)
    [place] = tmp_path.glob("synthetic-*[0-9a-f]")
    written = (place / "train_coco.json").stat().st_mtime_ns
    made = json.loads((place / "airfield.json").read_text())
    assert (made["fighters"], made["length_min"], made["length_max"]) == (recipe.synthetic.fighters, 18, 40)
    draw_scenes(load_recipe("detector_scratch", [*TINY, "synthetic.share=0.9", "synthetic.zoom=2"]), tmp_path / "three")
    assert (place / "train_coco.json").stat().st_mtime_ns == written
    draw_scenes(load_recipe("detector_scratch", [*TINY, "synthetic.seed=1"]), tmp_path / "four")
    assert len([p for p in tmp_path.glob("synthetic-*") if p.is_dir()]) == 2
    other = drawn_windows(recipe, tmp_path / "one", zoom=0.5)
    assert (len(other.dataset), other.share) == (2, 0.3)
    assert other.zoom == pytest.approx(recipe.synthetic.zoom / 2)
    assert other.dataset.has_masks


def test_the_drawn_windows_do_not_follow_the_class_or_the_range_of_the_data(tmp_path, caplog):
    recipe = load_recipe("detector_scratch", [*TINY, "data.category=ship", "data.range=[0,10000]"])
    draw_scenes(load_recipe("detector_scratch", [*TINY, "data.category=Airplane"]), tmp_path / "one")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    draw_scenes(recipe, tmp_path / "one")
    assert "the drawn windows show planes, which are taught as 'ship'" in caplog.text
    sample = drawn_windows(recipe, tmp_path / "one").dataset.samples[0]
    assert len(sample.boxes)
    assert sample.read().mean() > 20


def test_a_training_sees_them(airfield, tmp_path, monkeypatch):
    """Through the trainer, which hands them to the batches."""
    seen = []
    original = DetectorBatches._example

    def noted(self, item, rng):
        seen.append(self.dataset.samples[item].path.parts[-3] if self.other is None else "")
        return original(self, item, rng)

    monkeypatch.setattr(DetectorBatches, "_example", noted)
    small = ["window=64", "training.steps=2", "training.batch_size=2", "tiling.size=64", "training.ema=0"]
    recipe = load_recipe("detector_scratch", [*TINY, "synthetic.share=0.99", *small])
    train_detector(recipe, open_dataset(str(airfield), "train"), None, folder=tmp_path / "run" / "t", device="cpu")
    assert [s for s in seen if s.startswith("synthetic-")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synthetic.share=1", "share"),
        ("synthetic.lengths=[40,20]", "expected least and greatest"),
        ("window=null", "synthetic mixes drawn windows"),
    ],
)
def test_settings_that_cannot_be_are_told(override, message):
    more = ["window_zoom=1"] if override == "window=null" else []
    with pytest.raises(RecipeError, match=message):
        load_recipe("detector_scratch", [*TINY, *more, override])


def test_fighters_are_as_many_as_asked_for():
    def share(**fighters):
        rng = np.random.default_rng(0)
        planes = [random_aircraft(rng, **fighters) for _ in range(2000)]
        return sum(p.root_chord > 0.3 for p in planes) / len(planes)

    assert share() == pytest.approx(0.12, abs=0.03)
    assert share(fighters=0.6) == pytest.approx(0.6, abs=0.04)
    assert share(fighters=0.0) == 0


def test_an_airfield_of_an_earlier_release_is_still_its_own(tmp_path):
    """Its marker names no share of fighters."""
    settings = AirfieldSettings(train=1, test=0, size=256)
    prepare_airfield(tmp_path / "a", settings)
    assert "fighters" not in json.loads((tmp_path / "a" / "airfield.json").read_text())
    prepare_airfield(tmp_path / "b", replace(settings, fighters=0.5))
    assert json.loads((tmp_path / "b" / "airfield.json").read_text())["fighters"] == 0.5
    assert not prepare_airfield(tmp_path / "b", replace(settings, fighters=0.5))


def test_scenes_have_the_fighters_asked_for():
    none, all_of_them = (draw_scene(AirfieldSettings(size=256, fighters=share), "train", 0) for share in (0.0, 1.0))
    assert not np.array_equal(none.image, all_of_them.image)


class CapturedError(Exception):
    pass


def test_the_scale_of_the_network_comes_on_top(airfield, tmp_path, monkeypatch):
    def capture(*_, **settings):
        raise CapturedError(settings)

    monkeypatch.setattr("pipelines.training.detector.DetectorBatches", capture)
    recipe = load_recipe("detector_scratch", [*TINY, "synthetic.zoom=0.8", "architecture.zoom=0.5"])
    with pytest.raises(CapturedError) as caught:
        train_detector(recipe, open_dataset(str(airfield), "train"), None, folder=tmp_path / "t", device="cpu")
    assert caught.value.args[0]["other"].zoom == pytest.approx(0.4)


def test_detectron2_sees_them_too(airfield, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from pipelines.training.detectron2.trainer import _batches, training_config

    recipe = load_recipe("demo_detector_detectron2", TINY)
    draw_scenes(recipe, tmp_path / "t")
    cfg = training_config(recipe, tmp_path / "t", "cpu")
    batches = _batches(recipe, cfg, open_dataset(str(airfield), "train"))
    assert batches.other.share == 0.3
    assert len(batches.other.dataset) == 2
