"""Promotion through the command: first version, tie, gain, failed gate, case of aliases."""

from __future__ import annotations

import re

import pytest

from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("journey")


def _promote(project, model, *more, code=0):
    return project.step("promote", "--model", model, "--data", str(project.data), *more, code=code)


def _aliases(project):
    return dict(project.client.get_registered_model("gated").aliases)


def test_the_story_of_an_alias(gated):
    project = gated
    too_high = _promote(project, "gated/1", "--minimum", "0.999", code=2)
    assert "gated/1 not promoted to production: IoU" in too_high.stdout
    assert "(>= 0.999 required)" in too_high.stdout
    assert _aliases(project) == {}

    first = _promote(project, "gated/1", "--alias", "Production")
    assert "gated/1 is production now: 3 gates passed: IoU" in first.stdout
    assert {k: str(v) for k, v in _aliases(project).items()} == {"production": "1"}
    assert "3 gates passed" in project.client.get_model_version("gated", "1").tags["promoted_to_production"]

    again = _promote(project, "gated/Production")
    assert "gated/1 is production already" in again.stdout

    tie = _promote(project, "gated/2", code=2)
    equal = r"gated/2 not promoted to production: IoU gain (0\.\d{4}) \(\+0\.0000\) against \1 \(> \+0 required\)"
    assert re.search(equal, tie.stdout)

    far = _promote(project, "gated/3", "--min-gain", "0.9", code=2)
    assert "(>= +0.9 required)" in far.stdout
    assert str(_aliases(project)["production"]) == "1"

    better = _promote(project, "gated/latest")
    assert "gated/3 is production now" in better.stdout
    assert {k: str(v) for k, v in _aliases(project).items()} == {"production": "3", "previous": "1"}

    back = _promote(project, "gated@previous", "--min-gain", "-1")
    assert "gated/1 is production now" in back.stdout

    # Each decision is a run with both values.
    experiment = project.client.get_experiment_by_name("planes")
    runs = project.client.search_runs([experiment.experiment_id], "tags.task = 'promote'")
    runs = [r for r in runs if r.data.tags["version"].startswith("gated/")]
    refused = [r for r in runs if r.data.tags["decision"] == "refused"]
    assert len(refused) == 3
    both = next(r for r in refused if r.data.tags["version"] == "gated/3")
    assert both.data.metrics["candidate/IoU"] > both.data.metrics["baseline/IoU"]
    assert "gain" in both.data.tags["reason"]


def test_mistakes_are_one_line(gated):
    project = gated
    wrong = _promote(project, "gated/2", "--metric", "AP", code=1)
    assert "metric AP: a segmenter has none of that name; known: IoU, Dice" in error_line(wrong)
    assert "evaluating" not in wrong.stdout + wrong.stderr
    assert "no version, alias or stage '77'; versions: 1, 2, 3" in error_line(_promote(project, "gated/77", code=1))
    line = error_line(_promote(project, "nobody/1", code=1))
    assert "registered: " in line
    assert "gated" in line
    done = project.step("promote", "--model", "gated/3", "--data", "absent", code=1)
    assert "absent: no such file or folder" in error_line(done)
