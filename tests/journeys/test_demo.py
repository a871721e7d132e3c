"""The demo: it learns, promotes, scores, and a second run reuses everything.

A few steps on a small airfield, and as the README runs it, with what its models must reach. Both are run by `make soak`:
each of their steps has tests of its own in the suite.
"""

from __future__ import annotations

import re

import pandas as pd
import pytest

from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield
from tests.journeys.conftest import Project

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.slow]

DEMO = ("python", "-m", "scoring.demo")


def _promoted_and_scored(project, done, images):
    for name in ("planes-det", "planes-unet", "planes-inst"):
        assert str(project.client.get_registered_model(name).aliases["production"]) == "1"
    table = pd.read_parquet(project.folder / "predictions" / "planes-inst-1" / "inputs.parquet")
    assert table.image_id.nunique() == images
    assert "mlflow ui --backend-store-uri" in done.stdout


def _reused(project, again):
    assert again.stdout.count("has this recipe, data and code; reused") == 2
    assert "planes-inst: version 1 is this composition; reused" in again.stdout
    assert again.stdout.count("is production already") == 3
    assert len(project.client.search_model_versions("name = 'planes-det'")) == 1


@pytest.mark.soak
def test_a_short_run_goes_the_whole_way_and_a_second_one_reuses_it(tmp_path):
    data = tmp_path / "data"
    # What has learnt nothing detects planes everywhere, and all of them are outlined: one small scene to test on.
    prepare_airfield(data, AirfieldSettings(train=4, test=1, size=256, planes_min=3, planes_max=4, seed=1))
    # It is somebody's data then, and taken as it is.
    (data / "airfield.json").unlink()
    project = Project(tmp_path, data, empty=False)
    command = (*DEMO, "--data", "data", "--steps", "6")
    done = project.run(*command, real=True)
    assert "data: taken as it is" in done.stdout
    _promoted_and_scored(project, done, 1)
    _reused(project, project.run(*command))


def _metrics(text, name):
    line = re.search(rf"^  {name}/\d+ +(.*)$", text, re.M)[1]
    return {k: float(v) for k, v in re.findall(r"(\w+) (\d\.\d+)", line)}


@pytest.mark.soak
def test_the_models_reach_what_the_readme_promises(tmp_path):
    project = Project(tmp_path, None, empty=False)
    done = project.run(*DEMO, timeout=2400, real=True, OMP_NUM_THREADS="2")
    detector, unet = _metrics(done.stdout, "planes-det"), _metrics(done.stdout, "planes-unet")
    assert detector["AP50"] >= 0.90
    assert detector["AP"] >= 0.55
    assert unet["IoU"] >= 0.88
    # The composed version, from the table that scoring it prints last.
    masks = done.stdout.rpartition("Evaluation results for segm")[2].splitlines()[3]
    assert float(masks.split("|")[2]) >= 75
    _promoted_and_scored(project, done, 12)
    again = project.run(*DEMO)
    _reused(project, again)
    assert "data/airfield: already there" in again.stdout
