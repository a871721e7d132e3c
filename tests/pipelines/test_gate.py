"""Gates: pass, fail, first version ever, tie, slices, confidence, size, data; and mistakes in the file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.errors import DataError, RecipeError
from models.geometry.rle import rle_encode
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.side_by_side import Measurement, all_metrics, gain_confidence, measure, slowdown
from pipelines.registry.gates import (
    GATES,
    Gates,
    RequiredData,
    TwinGate,
    find_gates,
    judge,
    judge_data,
    judge_group,
    judge_size,
    judge_twin,
    largest_differences,
    parse_gates,
)

SIDE = 200


def _mask(box):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return rle_encode(mask)


@pytest.fixture
def dataset(monkeypatch):
    """Six images, each with a plane of 20 and one of 60 pixels."""
    monkeypatch.setattr(Dataset, "digest", lambda self: "d1")
    boxes = np.array([[10, 10, 30, 30], [100, 100, 160, 160]], np.float32)
    masks = tuple(_mask(b.astype(int)) for b in boxes)
    samples = [
        Sample(
            f"{'AB'[i % 2]}{i}",
            Path("x"),
            height=SIDE,
            width=SIDE,
            scene=str(i),
            boxes=boxes,
            masks=masks,
            crowd=np.zeros(2, bool),
        )
        for i in range(6)
    ]
    return Dataset("field", Path("x"), "test", "plane", tuple(samples))


def _finds(dataset, small=(), large=(), seconds=1.0, segmenter=False):
    """A detector that finds the small and the large planes of the images with these numbers."""
    predictions = []
    for number, sample in enumerate(dataset.samples):
        chosen = [i for i, numbers in enumerate((small, large)) if number in numbers]
        if segmenter:
            # A missed plane gets a mask of a quarter of its pixels.
            masks = [
                m if i in chosen else _mask([10, 10, 20, 20] if i == 0 else [100, 100, 130, 130])
                for i, m in enumerate(sample.masks)
            ]
            predictions.append(Instances.make(sample.image_id, SIDE, SIDE, sample.boxes, [1, 1], masks=masks))
        else:
            masks = [sample.masks[i] for i in chosen]
            predictions.append(
                Instances.make(sample.image_id, SIDE, SIDE, sample.boxes[chosen], [0.9] * len(chosen), masks=masks)
            )
    return Measurement(dataset, segmenter, predictions, [9.0] + [seconds] * 5, all_metrics(predictions, dataset, segmenter))


ALL = range(6)


@pytest.mark.parametrize(
    ("gate", "candidate", "baseline", "failed"),
    [
        ({"minimum": 0.9}, ALL, None, []),
        ({"minimum": 0.9}, [0, 1], None, ["AP"]),
        ({"minimum": 0.9}, [0, 1], [0], ["AP"]),
        ({"min_gain": 0}, ALL, [0, 1, 2], []),
        ({"min_gain": 0}, ALL, ALL, ["AP gain"]),
        ({"min_gain": 0}, ALL, None, []),
        ({"min_gain": 0.4}, ALL, [0, 1, 2], ["AP gain"]),
        ({"min_gain": -0.3}, [0, 1, 2, 3, 4], ALL, []),
        ({"min_gain": -0.01}, ALL, ALL, []),
        ({"min_gain": 0, "confidence": 0.95}, ALL, [], []),
        ({"min_gain": 0, "confidence": 0.95}, ALL, [1, 2, 3, 4, 5], ["AP gain, confidence"]),
        ({"min_gain": 0, "confidence": 0.95}, ALL, None, []),
    ],
)
def test_gates_on_a_metric(dataset, gate, candidate, baseline, failed):
    ours = _finds(dataset, candidate, ALL)
    theirs = None if baseline is None else _finds(dataset, baseline, ALL)
    checks = judge(Gates(metrics={"AP": gate}), "AP", ours, theirs)
    assert [c.gate for c in checks if not c.passed] == failed
    assert all("AP" in str(c) for c in checks)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_of_a_version_that_finds_nothing_no_twin_is_approved(dataset, precision):
    nothing = _finds(dataset)
    failed = [c for c in judge_twin(TwinGate(), precision, nothing, nothing) if not c.passed]
    assert [(c.gate, c.candidate) for c in failed] == [("metrics", "the version itself reaches 0")]


def test_a_twin_fails_on_the_same_images_as_its_parent(dataset):
    measured = _finds(dataset, ALL, ALL)
    ours, theirs = (replace(measured, failed={name: DataError("damaged")}) for name in ("A0", "B1"))
    assert "images that failed" in [c.gate for c in judge_twin(TwinGate(), "bf16", ours, theirs) if not c.passed]
    assert all(c.passed for c in judge_twin(TwinGate(), "bf16", ours, ours))


def test_the_confidence_is_the_share_of_resamples_that_gain(dataset):
    """One image of six differs: it is drawn at least once with probability 1 - (5/6)^6."""
    ours, theirs = _finds(dataset, ALL, ALL), _finds(dataset, [1, 2, 3, 4, 5], ALL)
    assert abs(gain_confidence("AP", 0, ours, theirs) - (1 - (5 / 6) ** 6)) < 0.06
    crops = [_finds(dataset, chosen, ALL, segmenter=True) for chosen in (ALL, [1, 2, 3, 4, 5])]
    assert gain_confidence("IoU", 0, *crops) == gain_confidence("AP", 0, ours, theirs)
    assert gain_confidence("mask_AP50", 0, ours, theirs) == gain_confidence("AP50", 0, ours, theirs)
    assert gain_confidence("AP", 0, ours, ours) == 0
    with pytest.raises(RecipeError, match="no confidence can be computed"):
        gain_confidence("APs", 0, ours, theirs)


@pytest.mark.parametrize(
    ("twin", "precision", "gate", "failed"),
    [
        ({}, "f32", {}, []),
        ({}, "bf16", {}, []),
        ({"small": [1, 2, 3, 4, 5]}, "bf16", {}, ["AP gain", "AP50 gain", "mask_AP gain", "mask_AP50 gain"]),
        ({"small": [1, 2, 3, 4, 5]}, "bf16", {"max_loss": 0.3}, []),
        # On all but a handful of resampled sets something is lost.
        ({"small": [0]}, "bf16", {"max_loss": 1.0}, ["AP loss", "AP50 loss", "mask_AP loss", "mask_AP50 loss"]),
        ({"seconds": 1.01}, "bf16", {}, ["speed"]),
        ({"seconds": 1.01}, "bf16", {"min_speedup": 0.9}, []),
        ({"seconds": 0.26}, "bf16", {"min_speedup": 4}, ["speed"]),
        ({"seconds": 0.24}, "bf16", {"min_speedup": 4}, []),
        # On a GPU twice the same differs by some percent.
        ({"seconds": 0.95}, "bf16-mixed", {}, ["speed"]),
        ({"seconds": 0.95}, "16-mixed", {}, ["speed"]),
        ({"seconds": 0.9}, "16-mixed", {}, []),
        ({"seconds": 0.95}, "16-mixed", {"min_speedup": 1}, []),
    ],
)
def test_a_twin_is_held_against_its_parent(dataset, twin, precision, gate, failed):
    parent = _finds(dataset, ALL, ALL)
    checks = judge_twin(TwinGate(**gate), precision, _finds(dataset, **{"small": ALL, "large": ALL, **twin}), parent)
    assert [c.gate for c in checks if not c.passed] == failed


@pytest.mark.parametrize(
    ("pixels", "score", "passed"),
    [(0.009, 0, True), (0.011, 0, False), (0, 9e-5, True), (0, 1.1e-4, False), (0, -1.1e-4, False)],
)
def test_in_full_precision_a_twins_detections_are_its_parents(dataset, pixels, score, passed):
    parent = _finds(dataset, ALL, ALL)
    first = parent.predictions[-1]
    moved = Instances.make(
        first.image_id, SIDE, SIDE, first.boxes + np.float32(pixels), [0.9, 0.9 + score], masks=list(first.masks)
    )
    twin = replace(parent, predictions=[*parent.predictions[:-1], moved])
    checks = judge_twin(TwinGate(), "f32", twin, parent)
    assert [c.gate for c in checks if not c.passed] == ([] if passed else ["detections"])
    assert not [c for c in judge_twin(TwinGate(), "bf16", twin, parent) if not c.passed]
    fewer = replace(parent, predictions=[*parent.predictions[:-1], first.take(np.array([0]))])
    assert "detections" in [c.gate for c in judge_twin(TwinGate(max_loss=1), "f32", fewer, parent) if not c.passed]


@pytest.mark.parametrize("segmenter", [False, True])
@pytest.mark.parametrize(("columns", "passed"), [(20, True), (19.5, True), (18, False), (0, False)])
def test_in_full_precision_each_mask_is_its_parents(dataset, columns, passed, segmenter):
    """The small plane of one image has 20 columns; half a column is ten of its 400 pixels, IoU 0.975."""
    parent = _finds(dataset, ALL, ALL, segmenter=segmenter)
    first = parent.predictions[0]
    mask = np.zeros((SIDE, SIDE), bool)
    mask[10:30, 10 : 10 + int(columns)] = True
    if columns % 1:
        mask[10:20, 10 + int(columns)] = True
    # The mask's box is as before, so that nothing but the masks tells them apart.
    order = [int(np.flatnonzero((first.boxes == box).all(axis=1))[0]) for box in dataset.samples[0].boxes]
    masks = list(first.masks)
    masks[order[0]] = rle_encode(mask)
    twin = replace(parent, predictions=[replace(first, masks=tuple(masks)), *parent.predictions[1:]])
    differences = largest_differences(twin, parent)
    assert (differences.pixels, differences.score) == (0, 0)
    assert differences.mask_iou == pytest.approx({20: 1, 19.5: 0.975, 18: 0.9, 0: 0}[columns])
    refused = [c.gate for c in judge_twin(TwinGate(max_loss=1), "f32", twin, parent) if not c.passed]
    assert ("detections" in refused) == (not passed)
    assert "detections" not in [c.gate for c in judge_twin(TwinGate(max_loss=1), "bf16", twin, parent)]


def test_masks_that_are_empty_in_both_are_the_same(dataset):
    parent = _finds(dataset, ALL, ALL)
    first = parent.predictions[0]
    empty = replace(first, masks=(rle_encode(np.zeros((SIDE, SIDE), bool)), first.masks[1]))
    parent = replace(parent, predictions=[empty, *parent.predictions[1:]])
    assert largest_differences(parent, parent).mask_iou == 1


def test_a_twin_that_cannot_predict_what_its_parent_can_is_refused(dataset):
    parent = _finds(dataset, ALL, ALL)
    lost = {"A0": DataError("A0: lost")}
    twin = replace(parent, predictions=parent.predictions[1:], failed=lost, seconds=[math.nan, *parent.seconds[1:]])
    assert "images that failed" in [c.gate for c in judge_twin(TwinGate(max_loss=1), "bf16", twin, parent) if not c.passed]
    # What both cannot predict says nothing of the twin.
    both = replace(parent, failed=lost)
    assert not [c for c in judge_twin(TwinGate(), "bf16", both, both) if not c.passed and c.gate != "speed"]
    nothing = replace(parent, seconds=[math.nan] * 6)
    assert [c.gate for c in judge_twin(TwinGate(), "bf16", nothing, parent) if not c.passed] == ["speed"]


def test_a_twin_is_not_approved_on_images_without_planes(dataset):
    blank = replace(_finds(dataset, ALL, ALL), metrics={"AP": math.nan, "AP50": math.nan})
    assert [c.gate for c in judge_twin(TwinGate(), "bf16", blank, blank) if not c.passed] == ["metrics"]


def test_what_a_twin_may_lose_is_said_by_precision():
    assert [TwinGate().loss(precision) for precision in ("f32", "bf16", "int8")] == [0.0005, 0.005, 0.01]
    assert TwinGate(max_loss=0.02).loss("f32") == 0.02
    file = parse_gates({"gates": {}, "accelerate": {"bf16": {"max_loss": 0.01, "min_speedup": 2}}}, "g")
    assert file.accelerate["bf16"] == TwinGate(max_loss=0.01, min_speedup=2)
    for wrong in ({"int4": {}}, {"bf16": {"max_los": 1}}, {"bf16": {"min_speedup": 0}}):
        with pytest.raises(RecipeError, match="accelerate"):
            parse_gates({"gates": {}, "accelerate": wrong}, "g")


def test_a_slice_must_not_get_worse(dataset):
    better_but_not_for_small = _finds(dataset, [0, 1], ALL), _finds(dataset, [0, 1, 2], [0, 1])
    gates = Gates(slices={"small planes": {"size": "small"}, "large ones": {"size": "medium"}, "A": {"images": "A*"}})
    checks = {c.gate: c for c in judge(gates, "AP", *better_but_not_for_small)}
    assert {k for k, c in checks.items() if not c.passed} == {"small planes: AP"}
    assert judge(Gates(slices={"s": {"size": "small", "max_loss": 0.2}}), "AP", *better_but_not_for_small)[0].passed
    # Crops: IoU 1 where found, a quarter where missed.
    crops = _finds(dataset, [0, 1], ALL, segmenter=True), _finds(dataset, [0, 1, 2], [0, 1], segmenter=True)
    checks = judge(gates, "IoU", *crops)
    assert [c.passed for c in checks] == [False, True, True]
    assert checks[0].candidate.startswith(f"{(2 + 4 / 4) / 6:.4f}")
    # What the data does not show cannot be judged, and does not pass.
    (unseen,) = judge(Gates(slices={"huge": {"size": "large"}}), "AP", *better_but_not_for_small)
    assert (unseen.passed, unseen.candidate) == (False, "cannot be measured")
    assert math.isnan(crops[0].of_images("Z*", "IoU"))


def test_an_image_that_failed_counts_in_its_slice_and_masks_need_outlines(dataset):
    whole = _finds(dataset, ALL, ALL)
    first = dataset.samples[0].image_id
    failed = replace(whole, predictions=[f for f in whole.predictions if f.image_id != first])
    assert whole.of_images("*", "mask_AP50") == whole.of_images("*", "AP50") == 1
    assert failed.of_images(first, "AP50") == 0
    assert 0 < failed.of_images("*", "mask_AP50") < 1
    boxes = replace(dataset, samples=tuple(replace(s, masks=(None, None)) for s in dataset.samples))
    assert math.isnan(replace(whole, dataset=boxes).of_images("*", "mask_AP50"))


def test_time_is_a_median_without_the_first_image(dataset):
    slow, quick = _finds(dataset, ALL, ALL, seconds=3.0), _finds(dataset, ALL, ALL, seconds=2.0)
    assert slowdown(slow, quick) == 1.5
    # The first image warms up; of one alone nothing else is known.
    assert slowdown(replace(slow, seconds=[30.0, 3.0]), replace(quick, seconds=[1.0, 2.0])) == 1.5
    assert slowdown(replace(slow, seconds=[30.0]), replace(quick, seconds=[1.0])) == 30
    assert [judge(Gates(max_slowdown=m), "AP", slow, quick)[0].passed for m in (1.4, 1.6)] == [False, True]
    assert judge(Gates(max_slowdown=0.1), "AP", slow, None)[0].passed is False


def test_sizes_planes_and_data(dataset):
    assert [c.passed for c in judge_size(Gates(max_size=1.5, max_megabytes=20), 30, 15)] == [False, False]
    assert [c.passed for c in judge_size(Gates(max_size=2, max_megabytes=30), 30, 15)] == [True, True]
    assert [c.passed for c in judge_size(Gates(max_size=1.5), 30, None)] == [True]
    assert [judge(Gates(min_planes=n), "AP", _finds(dataset), None)[0].passed for n in (12, 13)] == [True, False]
    required = [RequiredData(path="a", digest="d1"), RequiredData(path="b")]
    assert [c.passed for c in judge_data(required, ["d1"])] == [True]
    assert [c.passed for c in judge_data(required, ["d2"])] == [False]


def test_what_cannot_be_measured_passes_no_gate(dataset):
    """There are no large planes: their metric is NaN, and so is a gain of it and the confidence of a single image."""
    one = dataset.subset(["A0"], "test")
    ours, theirs = _finds(one, ALL, ALL), _finds(one, [], [])
    for gate in ({"minimum": 0.0}, {"min_gain": -1.0}):
        (check,) = judge(Gates(metrics={"APl": gate}), "AP", ours, theirs)
        assert (check.passed, check.candidate) == (False, "cannot be measured")
        assert not judge(Gates(metrics={"APl": gate}), "AP", ours, None)[0].passed
    checks = judge(Gates(metrics={"AP": {"min_gain": 0.1, "confidence": 0.5}}), "AP", ours, theirs)
    assert [(c.gate, c.passed) for c in checks] == [("AP gain", True), ("AP gain, confidence", False)]
    assert checks[1].candidate == "cannot be measured"


def test_an_interrupted_measurement_goes_on(dataset, tmp_path, monkeypatch):
    seen = []

    class Detector:
        def predict(self, images):
            seen.append(len(seen))
            if len(seen) == 6:
                raise KeyboardInterrupt
            return [Instances.make("0", SIDE, SIDE, [[10, 10, 30, 30]], [0.5])]

    monkeypatch.setattr(Sample, "read", lambda self: np.zeros((SIDE, SIDE, 3), np.uint8))
    kept = tmp_path / "work" / "kept.jsonl"

    def run():
        return measure({"a": Detector(), "b": Detector()}, dataset, lambda items, total, title: items, kept=kept)

    with pytest.raises(KeyboardInterrupt):
        run()
    with open(kept, "a") as handle:
        handle.write('["a", 1.0, ["cut')
    measured = run()
    # Five of twelve were kept.
    assert len(seen) == 6 + 7
    assert all(len(m.predictions) == 6 and m.metrics["AP"] == measured["a"].metrics["AP"] > 0 for m in measured.values())


def test_the_projects_own_files_are_valid_and_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in GATES.glob("*.yaml"):
        file, source = find_gates(path.stem)
        assert source == str(path)
        assert file.of("challenger").against == "production"
        assert file.of("anything") == file.of("production")
        assert file.data[0].path == "data/airfield"
    assert find_gates("prod.planes-det")[1] == str(GATES / "planes-det.yaml")
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "planes-det.yaml").write_text("gates: {production: {min_planes: 3}}")
    assert find_gates("planes-det")[0].of("production").min_planes == 3
    with pytest.raises(RecipeError, match=r"gates/planes-x\.yaml: no such file; give --gates FILE"):
        find_gates("planes-x")
    with pytest.raises(RecipeError, match="gates absent: no such file"):
        find_gates("planes-det", "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"gates": {"production": {"metrics": {"AP": {"minimun": 1}}}}},
            "unknown key 'gates.production.metrics.AP.minimun'; did you mean 'minimum'",
        ),
        ({"gates": {"production": {"max_slow": 1}}}, "did you mean 'max_slowdown'"),
        (
            {"gates": {"production": {"max_slowdown": 0}}},
            r"gates\.production\.max_slowdown: Input should be greater than 0",
        ),
        ({"gates": {"production": {"metrics": {"AP": {"confidence": 0.9}}}}}, "confidence needs min_gain"),
        ({"gates": {"production": {"slices": {"s": {"size": "tiny"}}}}}, "expected size"),
        ({"gates": {"production": {"slices": {"s": {}}}}}, "expected size"),
        ({}, "gates: Field required"),
        ([], "whole file: "),
    ],
)
def test_mistakes_in_the_file(content, message):
    with pytest.raises(RecipeError, match=message):
        parse_gates(content, "gates x.yaml")


def test_an_unknown_metric_names_those_there_are(dataset):
    with pytest.raises(RecipeError, match="metric APP: not known here; known: AP, AP50"):
        judge(Gates(metrics={"APP": {"minimum": 1}}), "AP", _finds(dataset, ALL, ALL), None)


def test_no_gates_for_an_alias():
    with pytest.raises(RecipeError, match="none for staging, and none for production; known: challenger"):
        parse_gates({"gates": {"challenger": {}}}, "x").of("staging")


def _with_ap(dataset, value):
    measured = Measurement.__new__(Measurement)
    object.__setattr__(measured, "dataset", dataset)
    object.__setattr__(measured, "at", lambda metric: value)
    return measured


@pytest.mark.parametrize(
    ("ours", "theirs", "passed"),
    [
        ((0.50, 0.51, 0.52), (0.40, 0.41, 0.42), True),
        ((0.50, 0.41, 0.62), (0.40, 0.41, 0.42), False),
        ((0.50, 0.51, 0.52), (0.40,), True),
        ((0.44, 0.50, 0.56), (0.45,), False),
        ((0.40, 0.41, 0.42), (0.50, 0.51, 0.52), False),
    ],
)
def test_a_gain_of_a_group_must_be_beyond_the_noise_of_seeds(dataset, ours, theirs, passed):
    gates = Gates(metrics={"AP": {"min_gain": 0}, "AP50": {"minimum": 0.1}})
    sides = [[_with_ap(dataset, v) for v in side] for side in (ours, theirs)]
    (check,) = judge_group(gates, *sides)
    assert (check.gate, check.data, check.passed) == ("AP gain over seeds", "field/test", passed)
    assert ("beyond the noise" in check.candidate) == (passed or ours == (0.40, 0.41, 0.42))
    # A first promotion has nothing to be held against.
    assert judge_group(gates, sides[0], []) == []


def test_a_gain_of_a_group_must_reach_what_is_asked_for(dataset):
    sides = [[_with_ap(dataset, v) for v in side] for side in ((0.50, 0.51, 0.52), (0.40, 0.41, 0.42))]
    for least, passed in ((0.05, True), (0.09, False)):
        (check,) = judge_group(Gates(metrics={"AP": {"min_gain": least}}), *sides)
        assert check.passed is passed
