"""The gate: pass, fail, first version ever, tie; and what MLflow's registry then says."""

import math

import pytest

from pipelines.promotion import Gate, decide


@pytest.mark.parametrize(
    ("gate", "candidate", "present", "passed", "reason"),
    [
        (Gate("AP", 0.5), 0.6, None, True, "first version there"),
        (Gate("AP", 0.5), 0.4, None, False, "below the minimum"),
        (Gate("AP", 0.5), 0.4, 0.3, False, "below the minimum"),
        (Gate("AP", 0.5), 0.7, 0.6, True, "gain +0.1000"),
        (Gate("AP", 0.5), 0.6, 0.7, False, "gain -0.1000 is below"),
        (Gate("AP"), 0.6, 0.6, False, "equals the present version"),
        (Gate("AP", 0, 0.05), 0.63, 0.6, False, "below +0.0500"),
        (Gate("AP", 0, -0.05), 0.58, 0.6, True, "gain -0.0200"),
        (Gate("AP", 0, -0.05), 0.6, 0.6, True, "gain +0.0000"),
        (Gate("AP", 0.6), 0.6, None, True, "reaches the minimum"),
        (Gate("AP"), math.nan, None, False, "below the minimum"),
    ],
)
def test_decisions(gate, candidate, present, passed, reason):
    decision = decide(gate, candidate, present)
    assert decision.passed is passed
    assert reason in decision.reason
