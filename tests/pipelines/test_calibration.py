"""Calibration, its error, and thresholds, held to independent computations."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve

from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.engines.torchvision.predictor import detector_spec
from models.errors import ModelError
from models.instances import Instances
from models.saved.folder import save_model
from models.saved.scores import Scores
from models.saved.spec import read_spec
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.calibration import (
    Outcomes,
    best_threshold,
    calibration_error,
    fit_scores,
    measure_across,
    measure_scores,
    outcomes,
    precision_recall,
    reliability,
)


def _sample(count=4000, slope=0.5, intercept=-1.0, seed=0):
    """Detections whose log-odds of being correct are known."""
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.uniform(0.05, 0.999, count))[::-1]
    truth = 1 / (1 + np.exp(-(slope * np.log(scores / (1 - scores)) + intercept)))
    correct = rng.random(count) < truth
    return Outcomes(scores, correct, int(correct.sum()) + 100, np.arange(count)), truth


def test_the_calibration_is_found_again_and_lowers_the_error():
    found, truth = _sample()
    scores = fit_scores(found, "here")
    assert (scores.slope, scores.intercept) == (pytest.approx(0.5, abs=0.08), pytest.approx(-1.0, abs=0.1))
    assert np.abs(scores.probability(found.scores) - truth).max() < 0.05
    measured = measure_scores(found, scores)
    assert measured["calibration_error"] == pytest.approx(np.abs(found.scores - truth).mean(), abs=0.03)
    assert measured["calibration_error_calibrated"] < 0.03
    # The order of detections, and with it AP, stays.
    assert (np.diff(scores.probability(found.scores)) <= 0).all()
    again = LogisticRegression(C=np.inf).fit(np.log(found.scores / (1 - found.scores))[:, None], found.correct)
    assert scores.slope == pytest.approx(again.coef_[0, 0], rel=1e-3)


def test_the_error_is_that_of_a_count_by_hand():
    probability, correct = np.array([0.05, 0.08, 0.55, 0.58, 1.0]), np.array([False, True, True, True, False])
    assert reliability(probability, correct) == [
        (pytest.approx(0.065), 0.5, 2), (pytest.approx(0.565), 1.0, 2), (1.0, 0.0, 1),
    ]  # fmt: skip
    assert calibration_error(probability, correct) == pytest.approx((2 * 0.435 + 2 * 0.435 + 1.0) / 5)
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0, bool)))


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_has_the_best_f1_of_all(seed):
    rng = np.random.default_rng(seed)
    # Coarse, so that scores are equal.
    scores = np.sort(rng.integers(2, 30, 60) / 30)[::-1]
    correct = rng.random(60) < scores
    found = Outcomes(scores, correct, int(correct.sum()), np.zeros(60, int))
    precision, recall, _ = precision_recall_curve(correct, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    ours = precision_recall(found, best_threshold(found))
    assert 2 * ours[0] * ours[1] / (ours[0] + ours[1]) == pytest.approx(f1.max())
    assert best_threshold(found) not in scores


def test_missed_planes_count_in_the_threshold():
    found = Outcomes(np.array([0.9, 0.6, 0.5]), np.array([True, False, True]), 2, np.zeros(3, int))
    assert best_threshold(found) == pytest.approx(0.25)
    found = Outcomes(np.array([0.9, 0.6, 0.5, 0.4]), np.array([True, False, False, True]), 2, np.zeros(4, int))
    assert best_threshold(found) == pytest.approx(0.75)
    # Where most are missed there is little to lose by false ones.
    assert best_threshold(replace(found, planes=10)) == pytest.approx(0.2)
    found = Outcomes(np.array([0.9, 0.6, 0.5]), np.array([True, False, True]), 2, np.zeros(3, int))
    assert precision_recall(found, 0.55) == (0.5, 0.5)
    nothing = Outcomes(np.zeros(0), np.zeros(0, bool), 0, np.zeros(0, int))
    assert all(math.isnan(v) for v in precision_recall(nothing, 0.5))


@pytest.mark.parametrize("case", ["few", "all correct", "upside down"])
def test_what_says_too_little_is_not_fitted(case):
    scores = np.linspace(0.9, 0.1, 100)
    correct = {"few": scores > 0.5, "all correct": scores > 0, "upside down": scores < 0.5}[case]
    chosen = slice(0, 10) if case == "few" else slice(None)
    found = Outcomes(scores[chosen], correct[chosen], 50, np.zeros(100, int)[chosen])
    assert fit_scores(found, "x") is None


def test_each_fold_is_judged_by_the_others():
    found, _ = _sample(900)
    folds = np.arange(900) % 3 + 1
    planes = {1: 100, 2: 150, 3: found.planes - 250}
    measured = measure_across(found, folds, planes)
    probability, right, shown = np.zeros(900), 0, 0
    for fold in planes:
        rest = np.flatnonzero(folds != fold)
        scores = fit_scores(found.take(rest, found.planes - planes[fold]), "x")
        mine = np.flatnonzero(folds == fold)
        probability[mine] = scores.probability(found.scores[mine])
        kept = found.scores[mine] >= scores.threshold
        right, shown = right + (found.correct[mine] & kept).sum(), shown + kept.sum()
    assert measured["calibration_error_calibrated"] == pytest.approx(calibration_error(probability, found.correct))
    assert measured["precision_at_suggested"] == pytest.approx(right / shown)
    assert measured["recall_at_suggested"] == pytest.approx(right / found.planes)
    assert measured["precision_at_0.5"] == pytest.approx(precision_recall(found, 0.5)[0])
    # A fold without the other two has too little to go by.
    assert measure_across(found.take(np.arange(15), 9), folds[:15], planes) == {}


def test_outcomes_are_cocos_and_leave_crowds_out(airfield):
    dataset = open_dataset(airfield, "test")
    sample = dataset.samples[0]
    boxes = np.concatenate([sample.boxes[:3], [[0, 0, 4, 4]], sample.boxes[:1]])
    made = [Instances.make(sample.image_id, sample.height, sample.width, boxes, [0.9, 0.8, 0.04, 0.7, 0.6])]
    found = outcomes(dataset, made)
    # The third is below 0.05, the last hits a plane that is taken.
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert found.correct.tolist() == [True, True, False, False]
    assert (found.planes, set(found.images.tolist())) == (dataset.planes, {0})
    # In a crowd a detection is neither right nor wrong.
    samples = (replace(sample, crowd=np.arange(len(sample.boxes)) == 1), *dataset.samples[1:])
    found = outcomes(replace(dataset, samples=samples), made)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found.planes == dataset.planes - 1


def test_scores_are_kept_with_a_saved_model_and_checked(tmp_path):
    small = DetectorArchitecture(
        backbone="resnet18",
        norm="batch",
        levels=[3],
        pooled_level=False,
        anchor_sizes=[[32]],
        fpn_channels=8,
        head_channels=8,
    )
    spec = detector_spec(small, ["plane"])
    scores = Scores(slope=0.7, intercept=-0.2, threshold=0.4, detections=99, fitted_on="validation")
    folder = save_model(tmp_path / "m", spec.model_copy(update={"scores": scores}), build_detector(small, 1).state_dict())
    assert read_spec(folder).scores == scores
    content = json.loads((folder / "model.json").read_text())
    for changes, said in (
        ({"slope": -1}, "scores.slope"),
        ({"threshold": 2}, "scores.threshold"),
        ({"odd": 1}, "scores.odd"),
    ):
        (folder / "model.json").write_text(json.dumps({**content, "scores": {**content["scores"], **changes}}))
        with pytest.raises(ModelError, match=said):
            read_spec(folder)
    # Folders of releases that knew no calibration.
    del content["scores"]
    (folder / "model.json").write_text(json.dumps(content))
    assert read_spec(folder).scores is None
