"""What a version's scores mean: calibration, and the score from which its detections are worth showing."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

# Scores of 0 and 1 have no finite log-odds.
EDGE = 1e-6


class Scores(BaseModel):
    """Fitted on detections for images that the weights were not learnt from.

    Platt's calibration (Platt, 1999; on log-odds, Kull et al., AISTATS 2017): the log-odds of a detection being correct
    at an IoU of 0.5 are ``slope`` times those of its score, plus ``intercept``. It keeps the order of detections.

    Attributes:
        slope: of the log-odds; above 0. 1 with an intercept of 0 leaves scores as they are.
        intercept: of the log-odds.
        threshold: the score from which F1 was best.
        detections: how many it was fitted on.
        fitted_on: what those were detected in: validation, or out of fold with the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slope: float = Field(gt=0, allow_inf_nan=False)
    intercept: float = Field(allow_inf_nan=False)
    threshold: float = Field(ge=0, le=1)
    detections: int = Field(ge=1)
    fitted_on: str = Field(max_length=200)

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """The probability that detections with these scores (N,) are correct, float64 (N,)."""
        return 1 / (1 + np.exp(-(self.slope * log_odds(scores) + self.intercept)))


def log_odds(scores: np.ndarray) -> np.ndarray:
    """Logit of scores (N,), float64; those of 0 and 1 are moved off the edge."""
    clipped = np.clip(np.asarray(scores, np.float64), EDGE, 1 - EDGE)
    return np.log(clipped) - np.log1p(-clipped)
