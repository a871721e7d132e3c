"""`mlflow models serve` answers a plain HTTP client with the instances that `score` writes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
import pytest

from tests.journeys.conftest import DETECTOR
from tests.journeys.stack import free_port, http_status

pytestmark = pytest.mark.xdist_group("versions")

# Under a name of its own: that of planes-mask belongs to another test.
VERSIONS = ("planes-det/1", "planes-inst/1", "planes-mask-served/1")


@pytest.fixture(scope="module")
def served(composed, tmp_path_factory):
    """A project with a version of each model that finds planes, and the URL at which each is served."""
    project, _ = composed
    if not project.client.search_model_versions("name = 'planes-mask-served'"):
        changes = ("--set", " ".join(DETECTOR), "--steps", "4", "--name", "planes-mask-served")
        project.step("train_maskrcnn", "--data", str(project.data), *changes)
    env = project.env(MLFLOW_TRACKING_URI=f"sqlite:///{project.folder / 'mlflow.db'}")
    folder = tmp_path_factory.mktemp("serving")
    processes, urls = [], {}
    for version in VERSIONS:
        port = free_port()
        command = ["mlflow", "models", "serve", "-m", f"models:/{version}", "--env-manager", "local", "--port", str(port)]
        with open(folder / f"{port}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [*command, "--workers", "1"], env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
                )
            )
        urls[version] = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    for url in urls.values():
        while http_status(f"{url}/ping") != 200:
            assert time.monotonic() < deadline, [p.read_text()[-1500:] for p in folder.glob("*.log")]
            time.sleep(0.3)
    yield project, urls
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ask(url, images, **params):
    content = {"dataframe_split": {"columns": ["image"], "data": [[i] for i in images]}}
    body = json.dumps({**content, "params": params} if params else content).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return pd.DataFrame(json.loads(answer.read())["predictions"])


@pytest.mark.parametrize("version", VERSIONS)
def test_base64_gives_what_score_gives(served, version):
    project, urls = served
    path = project.data / "test" / "A0005.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    answer = _ask(urls[version], [encoded, f"data:image/png;base64,{encoded}"])
    project.score("--model", version, "--data", str(path), "--out", "served", "--score-threshold", "0", "--overlays", "0")
    table = pd.read_parquet(project.folder / "served" / version.replace("/", "-") / "instances.parquet")
    for number in ("0", "1"):
        rows = answer[answer.image_id == number].reset_index(drop=True)
        assert len(rows) == len(table)
        for column in ("x1", "y1", "x2", "y2", "score"):
            np.testing.assert_allclose(rows[column].to_numpy(float), table[column].to_numpy(float), atol=1e-3)
        if version != "planes-det/1":
            assert rows.mask_counts.tolist() == table.mask_counts.tolist()
            assert [list(s) for s in rows.mask_size] == [list(s) for s in table.mask_size]
    assert len(table) > 0 or version == "planes-mask-served/1"


def test_a_server_tells_nobody_which_files_it_has(served):
    project, urls = served
    messages = []
    for path in ("/absent.png", str(project.data / "test" / "A0005.png"), "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as error:
            _ask(urls["planes-det/1"], [path])
        assert error.value.code == 400
        messages.append(error.value.read().decode().partition("not a base64-encoded image file")[2])
    assert "this server takes no paths" in messages[0]
    # But for the row itself, which the answer repeats, all the same.
    assert len(set(messages)) == 1


def test_params_ask_for_a_score_and_for_tiles(served):
    project, urls = served
    path = project.data / "test" / "A0005.png"
    images = [base64.b64encode(path.read_bytes()).decode()] * 2
    url = urls["planes-inst/1"]
    plain = _ask(url, images)
    least = float(plain.score.astype(float).median())
    fewer = _ask(url, images, score_threshold=least)
    assert 0 < len(fewer) < len(plain)
    assert fewer.score.astype(float).min() >= least - 1e-6
    arguments = ("--model", "planes-inst/1", "--data", str(path), "--out", "tiled", "--score-threshold", "0.3")
    project.score(*arguments, "--overlays", "0", "--tile", "256")
    table = pd.read_parquet(project.folder / "tiled" / "planes-inst-1" / "instances.parquet")
    tiled = _ask(url, images[:1], score_threshold=0.3, tile=256)
    np.testing.assert_allclose(tiled.score.to_numpy(float), table.score.to_numpy(float), atol=1e-3)
    for params, message in (
        ({"score_threshold": 2}, "score_threshold 2: expected a number from 0 to 1"),
        ({"tile": 5}, "tile 5: tiles: size: Input should be greater than or equal to 32"),
        ({"tile": "large"}, "Invalid parameters found: "),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            _ask(url, images[:1], **params)
        answer = json.loads(error.value.read())
        assert (error.value.code, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
        # MLflow's server writes the request before it.
        assert answer["message"].splitlines()[-1].startswith(f"Error: {message}")
        assert not answer.get("stack_trace")
