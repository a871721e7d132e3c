"""`planes-registry verify`: files as registered, and the logged example predicted again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from models.loading import load_model
from pipelines.registry.verification import Example

pytestmark = pytest.mark.xdist_group("registry")

_ROW = {"image_id": "0", "instance": 0, "x1": 1.0, "y1": 1.0, "x2": 9.0, "y2": 9.0, "label": 0, "height": 96, "width": 96}
_ROW |= {"mask_size": None, "mask_counts": None}


def test_a_version_as_registered_passes(team):
    checked = team.registry("verify", "planes-det").stdout
    assert re.search(r"ok +files", checked)
    assert re.search(r"ok +example +\d+ planes as logged: boxes within 0 pixels|ok +example +no plane", checked)


def test_the_rows_of_an_example_are_what_the_version_predicts(team):
    """The logged output, compared with the saved model's own prediction."""
    version = team.client.get_model_version("planes-det", "1")
    example = Example.model_validate_json(team.content(version, "example.json"))
    folder = team.detector
    assert example.rows
    (predicted,) = load_model(folder, "cpu").predict([example.decoded()])
    np.testing.assert_allclose([r.score for r in example.rows], predicted.scores, atol=1e-4)


def test_a_version_that_predicts_something_else_fails(team):
    if team.store is not None:
        pytest.skip("files are changed where they lie, in a folder")
    team.register(team.good, "drifted")
    path = Path(team.client.get_model_version_download_uri("drifted", "1")) / "artifacts" / "example.json"
    logged = json.loads(path.read_text())
    for rows, message in (
        ([*logged["rows"], {**_ROW, "score": 0.5}], rf"FAIL +example +{len(logged['rows'])} planes, \d+ "),
        ([{"x1": 1}], "FAIL +example +.*is damaged"),
        ([{**_ROW, "score": 0.5, "mask_size": [9, 10**9], "mask_counts": "11"}], "FAIL +example +.*is damaged"),
    ):
        path.write_text(json.dumps({**logged, "rows": rows}))
        done = team.registry("verify", "drifted", code=1)
        assert re.search(message, done.stdout), done.stdout
        assert "Traceback" not in done.stderr
    path.write_text("{")
    assert "is damaged" in team.registry("verify", "drifted", code=1).stdout
    path.unlink()
    assert re.search(r"\? +example +no output was logged", team.registry("verify", "drifted").stdout)
