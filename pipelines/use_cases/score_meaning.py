"""What a version's scores mean, found out when it is published: fitted, kept in its folder, measured, drawn."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import mlflow

from models.instances import Instances
from models.saved.folder import rewrite_spec
from models.saved.scores import Scores
from models.saved.spec import read_spec
from pipelines.data.dataset import Dataset
from pipelines.evaluation import calibration, figures

log = logging.getLogger(__name__)

SEGMENTER = "segmenter"


def keep_scores(saved: Path, scores: Scores) -> None:
    """Write them into a saved folder.

    Raises:
        ModelError: it cannot be written.
    """
    spec = read_spec(saved)
    if spec.scores != scores:
        rewrite_spec(saved, spec.model_copy(update={"scores": scores}))


def fit_on(saved: Path, dataset: Dataset, predictions: Sequence[Instances], fitted_on: str) -> Scores | None:
    """What the scores of a saved detector mean by its predictions for images it was not trained on, kept in its folder.

    None, with the reason logged, where these say too little; crop segmenters have no scores.
    """
    if read_spec(saved).kind == SEGMENTER or not dataset.planes:
        return None
    scores = calibration.fit_scores(calibration.outcomes(dataset, predictions), fitted_on)
    if scores is None:
        log.info(f"{dataset.name}/{dataset.split}: too few detections to calibrate scores or suggest a threshold")
        return None
    keep_scores(saved, scores)
    return scores


def log_scores(scores: Scores, dataset: Dataset, predictions: Sequence[Instances], prefix: str) -> None:
    """Log how well scores hold on a data set: metrics under ``prefix``, and a figure of reliability."""
    if not dataset.planes:
        return
    found = calibration.outcomes(dataset, predictions)
    measured = calibration.measure_scores(found, scores)
    mlflow.log_metrics({prefix + k: v for k, v in measured.items() if math.isfinite(v)})
    mlflow.log_metric("suggested_score_threshold", scores.threshold)
    log.info(
        f"{dataset.split}: calibration error {measured['calibration_error']:.3f}, calibrated "
        f"{measured['calibration_error_calibrated']:.3f}; at the suggested score threshold {scores.threshold:.2f} "
        f"precision {measured['precision_at_suggested']:.2f}, recall {measured['recall_at_suggested']:.2f} "
        f"(at 0.5: {measured['precision_at_0.5']:.2f}, {measured['recall_at_0.5']:.2f})"
    )
    before, after = (calibration.reliability(v, found.correct) for v in (found.scores, scores.probability(found.scores)))
    title = f"{dataset.name}/{dataset.split}: {len(found.scores)} detections"
    mlflow.log_figure(figures.reliability_figure(before, after, title), f"figures/{dataset.split}_reliability.png")
