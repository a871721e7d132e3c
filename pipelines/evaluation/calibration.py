"""How often detections of a score are correct: calibration, its error, and the threshold with the best F1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.instances import Instances
from models.saved.scores import Scores, log_odds
from pipelines.data.dataset import Dataset
from pipelines.evaluation.matching import rank

# Fewer detections, or fewer of one kind among them, say too little.
LEAST, LEAST_OF_A_KIND = 20, 5
# Bins of equal width of calibration error and reliability curve (Guo et al., ICML 2017, take 15; our sets are smaller).
BINS = 10


@dataclass(frozen=True)
class Outcomes:
    """Detections of a data set, best score first: score, whether each is correct at an IoU of 0.5; and how many planes.

    Attributes:
        scores: float64 (N,).
        correct: bool (N,).
        planes: annotated planes, crowds left out.
        images: index of each detection's image in the data set, int64 (N,).
    """

    scores: np.ndarray
    correct: np.ndarray
    planes: int
    images: np.ndarray

    def take(self, index: np.ndarray, planes: int) -> Outcomes:
        """Some of the detections, in order."""
        return Outcomes(self.scores[index], self.correct[index], planes, self.images[index])


def outcomes(
    dataset: Dataset, predictions: Sequence[Instances], *, masks: bool = False, score_threshold: float = 0.05
) -> Outcomes:
    """COCO's matching at an IoU of 0.5; detections in crowds count as neither.

    Args:
        masks: match masks instead of boxes.
        score_threshold: least score that counts.
    """
    kept = [p.above(score_threshold) for p in predictions]
    ranked = rank(dataset, kept, "segm" if masks else "bbox")
    judged = ranked.correct[0] | ranked.wrong[0]
    return Outcomes(ranked.scores[judged], ranked.correct[0][judged], int(ranked.planes.sum()), ranked.image[judged])


def fit_scores(found: Outcomes, fitted_on: str) -> Scores | None:
    """Calibration (scikit-learn's logistic regression, not regularised) and threshold; None where too little is known.

    Nor is there any where higher scores are not correct more often.
    """
    from sklearn.linear_model import LogisticRegression

    right = int(found.correct.sum())
    if len(found.scores) < LEAST or min(right, len(found.scores) - right) < LEAST_OF_A_KIND:
        return None
    model = LogisticRegression(C=np.inf).fit(log_odds(found.scores)[:, None], found.correct)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope > 0):
        return None
    threshold = best_threshold(found)
    return Scores(
        slope=slope, intercept=intercept, threshold=threshold, detections=len(found.scores), fitted_on=fitted_on[:200]
    )


def best_threshold(found: Outcomes) -> float:
    """The score from which F1 is best, halfway to the next one below: scores that round otherwise stay on their side."""
    hits = np.cumsum(found.correct)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + max(found.planes, 1))
    # Equal scores come in together.
    last = np.append(found.scores[1:] < found.scores[:-1], True)
    best = int(np.flatnonzero(last)[f1[last].argmax()])
    below = found.scores[best + 1] if best + 1 < len(found.scores) else 0.0
    return float((found.scores[best] + below) / 2)


def calibration_error(probability: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: mean distance of probability and share of correct ones over bins, by their detections."""
    if not len(probability):
        return math.nan
    return float(sum(n * abs(p - share) for p, share, n in reliability(probability, correct)) / len(probability))


def reliability(probability: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean probability, share of correct ones, detections) of each of `BINS` bins that has any."""
    place = np.minimum((np.asarray(probability) * BINS).astype(int), BINS - 1)
    bins = [np.flatnonzero(place == b) for b in range(BINS)]
    return [(float(probability[i].mean()), float(correct[i].mean()), len(i)) for i in bins if len(i)]


def precision_recall(found: Outcomes, threshold: float) -> tuple[float, float]:
    """Precision (NaN without detections) and recall (NaN without planes) from a score upwards."""
    kept = found.scores >= threshold
    right = int((found.correct & kept).sum())
    return right / int(kept.sum()) if kept.any() else math.nan, right / found.planes if found.planes else math.nan


def measure_scores(found: Outcomes, scores: Scores) -> dict[str, float]:
    """Calibration error before and after, precision and recall at 0.5 and at the suggested threshold."""
    at_half, suggested = precision_recall(found, 0.5), precision_recall(found, scores.threshold)
    return {
        "calibration_error": calibration_error(found.scores, found.correct),
        "calibration_error_calibrated": calibration_error(scores.probability(found.scores), found.correct),
        "precision_at_0.5": at_half[0],
        "recall_at_0.5": at_half[1],
        "precision_at_suggested": suggested[0],
        "recall_at_suggested": suggested[1],
    }


def measure_across(found: Outcomes, folds: np.ndarray, planes: Mapping[int, int]) -> dict[str, float]:
    """As `measure_scores`, each fold by what was fitted on the others; empty where that is too little.

    Args:
        found: detections of all folds.
        folds: fold of each of them, int64 (N,).
        planes: annotated planes of each fold.
    """
    probability, kept = np.zeros(len(found.scores)), np.zeros(len(found.scores), bool)
    for fold in planes:
        others = np.flatnonzero(folds != fold)
        fitted = fit_scores(found.take(others, found.planes - planes[fold]), "other folds")
        if fitted is None:
            return {}
        mine = np.flatnonzero(folds == fold)
        probability[mine] = fitted.probability(found.scores[mine])
        kept[mine] = found.scores[mine] >= fitted.threshold
    at_half, right = precision_recall(found, 0.5), int((found.correct & kept).sum())
    return {
        "calibration_error": calibration_error(found.scores, found.correct),
        "calibration_error_calibrated": calibration_error(probability, found.correct),
        "precision_at_0.5": at_half[0],
        "recall_at_0.5": at_half[1],
        "precision_at_suggested": right / int(kept.sum()) if kept.any() else math.nan,
        "recall_at_suggested": right / found.planes if found.planes else math.nan,
    }
