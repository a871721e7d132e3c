"""The demo as the README runs it: it learns, promotes, scores, and a second run reuses everything."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from tests.journeys.conftest import Project

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("demo"), None)
    return project, project.run("python", "-m", "scoring.demo", timeout=2400, real=True)


def _metrics(text, name):
    line = re.search(rf"^  {name}/\d+ +(.*)$", text, re.M)[1]
    return {k: float(v) for k, v in re.findall(r"(\w+) (\d\.\d+)", line)}


def test_the_models_reach_what_the_readme_promises(demo):
    _, done = demo
    detector, unet = _metrics(done.stdout, "planes-det"), _metrics(done.stdout, "planes-unet")
    assert detector["AP50"] >= 0.90
    assert detector["AP"] >= 0.55
    assert unet["IoU"] >= 0.88
    # The composed version, from the table that scoring it prints last.
    masks = done.stdout.rpartition("Evaluation results for segm")[2].splitlines()[3]
    assert float(masks.split("|")[2]) >= 75


def test_versions_are_promoted_and_the_test_set_is_scored(demo):
    project, done = demo
    for name in ("planes-det", "planes-unet", "planes-inst"):
        assert str(project.client.get_registered_model(name).aliases["production"]) == "1"
    table = pd.read_parquet(project.folder / "predictions" / "planes-inst-1" / "instances.parquet")
    assert table.image_id.nunique() == 12
    assert "mlflow ui --backend-store-uri" in done.stdout


def test_a_second_run_reuses_what_is_there(demo):
    project, _ = demo
    again = project.run("python", "-m", "scoring.demo")
    assert again.stdout.count("has this recipe, data and code; reused") == 2
    assert "planes-inst: version 1 is this composition; reused" in again.stdout
    assert again.stdout.count("is production already") == 3
    assert "already there" in again.stdout
    assert len(project.client.search_model_versions("name = 'planes-det'")) == 1
