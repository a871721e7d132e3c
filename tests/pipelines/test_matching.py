"""Our matching against the evaluator's AP; errors by kind on drawn cases; the bootstrap on known differences."""

from pathlib import Path

import numpy as np
import pytest

from models.geometry.rle import rle_encode
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.matching import Ranked, bootstrap_difference, diagnose, disagreement, match_image, rank
from pipelines.evaluation.metrics import evaluate_instances
from tests.pipelines.test_evaluation import SIZE, _case, _mask


@pytest.fixture(autouse=True)
def _no_files(monkeypatch):
    monkeypatch.setattr(Dataset, "digest", lambda self: "0")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(8))
def test_ap_equals_the_evaluators(seed, kind):
    data, predictions = _case(seed)
    expected = evaluate_instances(data, predictions, kind, score_threshold=0.0).metrics
    curve = rank(data, predictions, kind).curve()
    assert curve.mean() == pytest.approx(expected["AP"], abs=1e-9)
    assert curve[0].mean() == pytest.approx(expected["AP50"], abs=1e-9)


def test_of_equal_overlaps_the_last_plane_is_taken_as_the_evaluator_does():
    """The first detection lies between two planes; which one it takes decides what is left for the second."""
    data = Dataset("d", Path("a"), "test", "plane", (_image([[0, 0, 20, 20], [4, 0, 24, 20]]),))
    instances = [_instances([[2, 0, 22, 20], [4, 0, 24, 20]])]
    expected = evaluate_instances(data, instances, score_threshold=0.0).metrics["AP"]
    assert match_image(data.samples[0], instances[0]).correct.sum(axis=1).tolist() == [2] * 4 + [1] * 6
    assert rank(data, instances).average_precision() == pytest.approx(expected, abs=1e-9)


def test_weights_count_images_as_often():
    data, predictions = _case(3)
    by_id = {p.image_id: p for p in predictions}
    empty = {s.image_id: Instances.empty(s.image_id, SIZE, SIZE, masks=True) for s in data.samples}
    matches = [match_image(s, by_id.get(s.image_id, empty[s.image_id])) for s in data.samples]
    weights = np.random.default_rng(0).integers(0, 4, len(matches))
    repeated = Ranked([m for m, w in zip(matches, weights, strict=True) for _ in range(w)])
    # Ties between images may be ordered otherwise.
    assert Ranked(matches).average_precision(weights.astype(float)) == pytest.approx(repeated.average_precision(), abs=0.01)


def _image(boxes, crowd=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    return Sample(
        "a", Path("a"), height=SIZE, width=SIZE, scene="a", boxes=boxes, masks=tuple(_mask(b) for b in boxes), crowd=crowd
    )


def _instances(boxes, scores=None, masks=True):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else scores
    return Instances.make("a", SIZE, SIZE, boxes, scores, masks=[_mask(b) for b in boxes] if masks else None)


def test_errors_by_kind():
    truth = _image([[0, 0, 20, 20], [50, 50, 80, 80], [100, 100, 120, 120], [0, 100, 30, 130]])
    instances = _instances([[0, 0, 20, 20], [1, 1, 20, 20], [60, 60, 90, 90], [130, 0, 150, 20]])
    diagnosis = diagnose(truth, instances, masks=False)
    assert diagnosis.detections == ["correct", "duplicate", "poorly localised", "false"]
    assert diagnosis.hit == {0}
    assert diagnosis.missed == {2, 3}
    assert diagnosis.counts() == {
        "correct": 1,
        "missed": 2,
        "false": 1,
        "duplicate": 1,
        "poorly localised": 1,
        "poorly outlined": 0,
    }


def test_a_good_box_with_a_bad_mask_is_poorly_outlined():
    truth = _image([[0, 0, 40, 40]])
    thin = np.zeros((SIZE, SIZE), bool)
    thin[0:40, 0:8] = True
    instances = Instances.make("a", SIZE, SIZE, [[0, 0, 40, 40]], [0.9], masks=[rle_encode(thin)])
    assert diagnose(truth, instances, masks=True).detections == ["poorly outlined"]
    assert diagnose(truth, instances, masks=True).missed == set()
    assert diagnose(truth, instances, masks=False).detections == ["correct"]


def test_crowds_and_empty_images_are_no_errors():
    diagnosis = diagnose(_image([[0, 0, 100, 100]], [True]), _instances([[10, 10, 20, 20]]), masks=False)
    assert diagnosis.counts() == dict.fromkeys(diagnosis.counts(), 0)
    nothing = diagnose(_image([]), _instances([]), masks=True)
    assert nothing.counts() == dict.fromkeys(nothing.counts(), 0)
    assert diagnose(_image([]), _instances([[0, 0, 9, 9]]), masks=True).detections == ["false"]
    assert diagnose(_image([[0, 0, 9, 9]]), _instances([]), masks=True).missed == {0}


def test_disagreement_is_what_the_other_lacks():
    first, second = _instances([[0, 0, 20, 20], [50, 50, 70, 70]]), _instances([[51, 51, 70, 70], [90, 90, 99, 99]])
    assert disagreement(first, second, masks=False) == ([0], [1])
    assert disagreement(first, _instances([]), masks=True) == ([0, 1], [])
    assert disagreement(first, first, masks=True) == ([], [])


def test_the_bootstrap_tells_a_gain_from_noise():
    rng = np.random.default_rng(0)
    samples = []
    for number in range(60):
        corners = rng.uniform(0, 120, (3, 2))
        boxes = np.concatenate([corners, corners + 30], 1).astype(np.float32)
        samples.append(
            Sample(
                f"{number}",
                Path("x"),
                height=SIZE,
                width=SIZE,
                scene="s",
                boxes=boxes,
                masks=(None,) * 3,
                crowd=np.zeros(3, bool),
            )
        )
    data = Dataset("d", Path("d"), "test", "plane", tuple(samples))

    def predict(noise, seed):
        draw = np.random.default_rng(seed)
        return [
            Instances.make(s.image_id, SIZE, SIZE, s.boxes + draw.normal(0, noise, s.boxes.shape), draw.random(3))
            for s in data.samples
        ]

    good, as_good, bad = (rank(data, predict(*a)) for a in ((2, 1), (2, 2), (6, 3)))
    low, high = bootstrap_difference(good, as_good)
    assert low < 0 < high
    low, high = bootstrap_difference(bad, good)
    assert 0 < low < good.average_precision() - bad.average_precision() < high
    assert bootstrap_difference(good, good) == (0.0, 0.0)
    one = data.subset(["0"], "test")
    assert bootstrap_difference(rank(one, predict(2, 1)[:1]), rank(one, [])) is None


def test_of_more_than_a_hundred_detections_the_best_hundred_count():
    corners = np.array([[x, y] for y in range(0, 132, 12) for x in range(0, 132, 12)][:120], np.float32)
    boxes = np.concatenate([corners, corners + 10], axis=1)
    data = Dataset("d", Path("a"), "test", "plane", (_image(boxes),))
    instances = [_instances(boxes, np.linspace(0.9, 0.5, len(boxes)))]
    expected = evaluate_instances(data, instances, "bbox", score_threshold=0.0).metrics["AP"]
    assert expected < 0.9
    assert rank(data, instances, "bbox").curve().mean() == pytest.approx(expected, abs=1e-9)
    assert match_image(data.samples[0], instances[0]).correct.sum(axis=1).tolist() == [100] * 10
