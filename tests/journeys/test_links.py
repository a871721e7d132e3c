"""Every command that made a run says where it is seen: the address, and the command whose port it has."""

from __future__ import annotations

import re

import pytest
from mlflow.tracking import MlflowClient

from pipelines.tracking.mlflow_runs import ui_link
from tests.conftest import write_image

pytestmark = pytest.mark.xdist_group("journey")


def test_each_command_prints_the_address_of_its_run(project, tmp_path):
    experiment = project.client.get_experiment_by_name("planes").experiment_id
    start = r"MLflow UI: \S+mlflow ui --backend-store-uri sqlite:\S+ --port 5000, then "
    table = start + re.escape(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?workflowType=machine_learning")
    page = (
        start
        + re.escape(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/")
        + r"([0-9a-f]{32})\?workflowType=machine_learning"
    )
    write_image(tmp_path / "a.png", 128, 128)
    scoring = ("score", "--data", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--model", "planes-det/1")
    said = [
        ("score", project.run(*scoring).stdout),
        ("train", project.train_unet("--name", "linked", "--steps", "1").stdout),
        ("promote", project.step("promote", "--model", "linked/1", "--data", str(project.data), "--minimum", "-1").stdout),
    ]
    for kind, text in said:
        (run_id,) = re.findall(page, text)
        assert project.client.get_run(run_id).data.tags["job_type"] == kind
    # Of several runs the table.
    trained = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    assert len(re.findall(table, project.run(*scoring, "--model", str(trained), "--fresh").stdout)) == 1


def test_a_link_to_a_server_that_went_down_ends_nothing(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for run_id in (None, "a" * 32):
        link = ui_link(MlflowClient("http://127.0.0.1:9"), run_id)
        assert link == "http://127.0.0.1:9/#/experiments/0/runs?workflowType=machine_learning"
