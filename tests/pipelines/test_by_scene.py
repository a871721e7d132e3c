"""Metrics by scene are those of the scene alone."""

from dataclasses import replace

import numpy as np
import pytest

from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.by_scene import scene_metrics, worst_first
from pipelines.evaluation.metrics import evaluate_instances, evaluate_masks


@pytest.fixture(scope="module")
def data(airfield):
    dataset = open_dataset(airfield, "train")
    # Two images a scene.
    samples = [replace(s, scene=f"s{i // 2}") for i, s in enumerate(dataset.samples)]
    return replace(dataset, samples=tuple(samples))


def _guesses(data, seed=0):
    rng = np.random.default_rng(seed)
    results = []
    for sample in data.samples[:-1]:
        keep = np.flatnonzero(rng.random(len(sample.boxes)) < 0.8)
        boxes = sample.boxes[keep] + rng.normal(0, 2, (len(keep), 4))
        false = rng.uniform(0, 60, (3, 4)) + [0, 0, 70, 70]
        scores = rng.uniform(0.06, 1, len(keep) + 3)
        masks = [sample.masks[i] for i in keep] + [sample.masks[0]] * 3
        boxes = np.concatenate([boxes, false])
        results.append(Instances.make(sample.image_id, sample.height, sample.width, boxes, scores, masks=masks))
    return results


@pytest.mark.parametrize(("kind", "shape"), [("detector", "bbox"), ("instance_segmenter", "segm")])
def test_a_scene_is_measured_as_if_it_were_alone(data, kind, shape):
    predictions = _guesses(data)
    scenes = scene_metrics(data, predictions, kind)
    assert set(scenes) == {s.scene for s in data.samples}
    for name, values in scenes.items():
        part = data.subset([s.image_id for s in data.samples if s.scene == name], "part")
        mine = [p for p in predictions if p.image_id in {s.image_id for s in part.samples}]
        expected = evaluate_instances(part, mine, shape).metrics
        assert values["AP"] == pytest.approx(expected["AP"], abs=1e-9)
        assert values["AP50"] == pytest.approx(expected["AP50"], abs=1e-9)
        assert (values["images"], values["planes"]) == (len(part), part.planes)


def test_precision_and_recall_are_counted_at_a_half(data):
    sample = data.samples[0]
    one = data.subset([sample.image_id], "one")
    boxes = np.concatenate([sample.boxes[:2], [[0, 0, 3, 3]], sample.boxes[2:3]])
    predictions = [Instances.make(sample.image_id, sample.height, sample.width, boxes, [0.9, 0.5, 0.7, 0.49])]
    values = scene_metrics(one, predictions, "detector")[sample.scene]
    assert values["precision"] == pytest.approx(2 / 3)
    assert values["recall"] == pytest.approx(2 / len(sample.boxes))


def test_crop_segmenters_are_measured_by_iou(data):
    perfect = [
        Instances.make(s.image_id, s.height, s.width, s.boxes, np.ones(len(s.boxes)), masks=s.masks) for s in data.samples
    ]
    scenes = scene_metrics(data, perfect[:-1], "segmenter")
    # The last image has no predictions, so its planes have an IoU of 0.
    last = data.samples[-1].scene
    part = data.subset([s.image_id for s in data.samples if s.scene == last], "part")
    masks = [list(s.masks) if s is not data.samples[-1] else [] for s in part.samples]
    assert scenes[last]["IoU"] == pytest.approx(evaluate_masks(part, masks).metrics["IoU"])
    assert {v["IoU"] for k, v in scenes.items() if k != last} == {1.0}


def test_the_worst_scene_comes_first_and_one_without_planes_last():
    scenes = {"a": {"AP50": 0.5}, "b": {"AP50": float("nan")}, "c": {"AP50": 0.1}, "d": {"AP50": 0.1}}
    assert worst_first(scenes, "AP50") == ["c", "d", "a", "b"]


def test_masks_and_boxes_are_not_ranked_together(data):
    """Where some planes have outlines, an instance segmenter is measured by those alone."""
    first, rest = data.samples[0], data.samples[1:]
    scene = first.scene
    some = replace(first, masks=(first.masks[0], *[None] * (len(first.masks) - 1)))
    none = [replace(s, masks=(None,) * len(s.masks)) if s.scene != scene else s for s in rest]
    mixed = replace(data, samples=(some, *none))
    predictions = [
        Instances.make(s.image_id, s.height, s.width, s.boxes, np.ones(len(s.boxes)), masks=s.masks) for s in data.samples
    ]
    scenes = scene_metrics(mixed, predictions, "instance_segmenter")
    assert (scenes[scene]["AP50"], scenes[scene]["recall"]) == (1, 1)
    outlined = 1 + sum(len(s.boxes) for s in rest if s.scene == scene)
    assert scenes[scene]["planes"] == outlined
    others = [v for k, v in scenes.items() if k != scene]
    assert others
    assert all(np.isnan(v["AP50"]) and v["planes"] == 0 for v in others)
