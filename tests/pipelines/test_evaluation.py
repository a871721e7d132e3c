"""Our numbers against pycocotools on random cases with crowds, empty images and ties."""

import contextlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.errors import DataError
from models.geometry.rle import rle_decode, rle_encode
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.metrics import COCO_METRICS, coco_results, evaluate_instances, evaluate_masks

SIZE = 160


def _boxes(rng, count):
    sizes = np.exp(rng.uniform(np.log(4), np.log(130), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (SIZE - sizes)
    return np.concatenate([corners, corners + sizes], 1).astype(np.float32)


def _mask(box):
    dense = np.zeros((SIZE, SIZE), bool)
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    dense[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = True
    return rle_encode(dense)


def _sample(number, boxes, crowd):
    masks = tuple(_mask(b) for b in boxes)
    return Sample(
        f"i{number}", Path(f"i{number}"), height=SIZE, width=SIZE, scene=f"i{number}", boxes=boxes, masks=masks, crowd=crowd
    )


def _case(seed):
    rng = np.random.default_rng(seed)
    samples, predictions = [], []
    for number in range(12):
        boxes = _boxes(rng, int(rng.integers(0, 6)))
        samples.append(_sample(number, boxes, rng.random(len(boxes)) < 0.2))
        jittered = (boxes + rng.normal(0, 3, boxes.shape)).clip(0, SIZE)
        jittered[:, 2:] = np.maximum(jittered[:, 2:], jittered[:, :2] + 1).clip(0, SIZE)
        guesses = np.concatenate([jittered[jittered[:, 0] < SIZE - 1], _boxes(rng, int(rng.integers(0, 5)))])
        if rng.random() < 0.2:
            continue
        # Scores on a coarse grid, so that many are equal.
        scores = rng.integers(1, 10, len(guesses)) / 10
        masks = [_mask(b) for b in guesses]
        predictions.append(Instances.make(f"i{number}", SIZE, SIZE, guesses, scores, masks=masks))
    return Dataset("case", Path("case"), "test", "plane", tuple(samples)), predictions


@pytest.fixture(autouse=True)
def _no_files(monkeypatch):
    monkeypatch.setattr(Dataset, "digest", lambda self: "0")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(8))
def test_twelve_numbers_equal_pycocotools(seed, kind):
    data, predictions = _case(seed)
    ours = evaluate_instances(data, predictions, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data.to_coco()
        truth.createIndex()
        numbers = {s.image_id: i for i, s in enumerate(data.samples, start=1)}
        reference = COCOeval(truth, truth.loadRes(coco_results(predictions, numbers, kind)), kind)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    for name, expected in zip(COCO_METRICS, reference.stats, strict=True):
        value = ours.metrics[name]
        assert (math.isnan(value) and expected == -1) or value == pytest.approx(expected, abs=1e-9), name


def test_perfect_predictions_score_one_and_none_score_zero():
    data, _ = _case(0)
    perfect = [Instances.make(s.image_id, SIZE, SIZE, s.boxes[~s.crowd], np.ones((~s.crowd).sum())) for s in data.samples]
    assert evaluate_instances(data, perfect).metrics["AP"] == pytest.approx(1)
    assert evaluate_instances(data, []).metrics["AP"] == 0


def test_settings_travel_with_the_numbers():
    data, predictions = _case(1)
    low, high = (evaluate_instances(data, predictions, score_threshold=t) for t in (0.05, 0.6))
    assert high.settings["score_threshold"] == 0.6
    assert high.settings["predictions"] < low.settings["predictions"]
    assert low.settings["max_dets"] == [1, 10, 100]
    assert high.metrics["AP"] <= low.metrics["AP"]


def test_without_planes_there_is_no_number():
    empty = Dataset("e", Path("e"), "test", "plane", (_sample(0, np.zeros((0, 4), np.float32), np.zeros(0, bool)),))
    result = evaluate_instances(empty, [Instances.make("i0", SIZE, SIZE, [[1, 1, 5, 5]], [0.9])])
    assert result.finite() == {}


def test_predictions_for_other_images_and_missing_truth_are_errors():
    data, _ = _case(2)
    with pytest.raises(DataError, match="an image that it does not have"):
        evaluate_instances(data, [Instances.empty("alien", 5, 5)])
    plain = Dataset(
        "p",
        Path("p"),
        "t",
        "plane",
        (
            Sample(
                "a",
                Path("a"),
                height=5,
                width=5,
                scene="a",
                boxes=np.zeros((0, 4)),
                masks=(),
                crowd=np.zeros(0),
                truth=False,
            ),
        ),
    )
    with pytest.raises(DataError, match="no ground truth"):
        evaluate_instances(plain, [])


def test_mask_iou_and_dice_equal_brute_force():
    data, _ = _case(3)
    guesses, ious, dices = [], [], []
    for sample in data.samples:
        mine = [_mask((box + [2, 0, 2, 0]).clip(0, SIZE)) for box in sample.boxes]
        guesses.append(mine)
        for truth, guess, crowd in zip(sample.masks, mine, sample.crowd, strict=True):
            a, b = rle_decode(truth), rle_decode(guess)
            if not crowd:
                ious.append((a & b).sum() / (a | b).sum())
                dices.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    metrics = evaluate_masks(data, guesses).metrics
    assert metrics["IoU"] == pytest.approx(np.mean(ious))
    assert metrics["Dice"] == pytest.approx(np.mean(dices))
    assert metrics["IoU_min"] == pytest.approx(np.min(ious))
