"""The MLflow UI in headless Chromium: the training run, its charts' metrics and its figures are there."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

pytestmark = pytest.mark.xdist_group("journey")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(project):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = f"sqlite:///{project.folder / 'mlflow.db'}"
    command = [
        "mlflow",
        "server",
        "--backend-store-uri",
        store,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    env = project.env(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    process = subprocess.Popen(command, cwd=project.folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            break
        except OSError:
            assert time.monotonic() < deadline, "the MLflow server did not start"
            assert process.poll() is None, "the MLflow server ended"
            time.sleep(0.3)
    yield url
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def page(server):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*flags, "--disable-component-update", "--disable-sync"]
        )
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def test_the_training_run_is_readable_in_the_ui(project, server, page, tmp_path):
    version = project.client.get_model_version("planes-unet", "1")
    experiment = project.client.get_experiment_by_name("planes").experiment_id
    page.goto(f"{server}/#/experiments/{experiment}/runs/{version.run_id}")
    page.get_by_text("planes-unet demo_unet").first.wait_for()
    for text in ("training.batch_size", "val/IoU", "test/IoU", "git_commit"):
        assert page.get_by_text(text, exact=True).count() > 0, text
    page.screenshot(path=str(tmp_path / "run.png"))
    page.goto(f"{server}/#/experiments/{experiment}/runs/{version.run_id}/artifacts/figures/loss.png")
    image = page.locator("img[src*='loss.png'], img[src^='blob:']").first
    image.wait_for()
    page.screenshot(path=str(tmp_path / "figure.png"))


def test_the_link_that_commands_print_leads_to_the_table_of_runs(project, server, page, tmp_path):
    done = project.registry("list", MLFLOW_TRACKING_URI=server)
    assert "planes-unet/1" in done.stdout
    from mlflow.tracking import MlflowClient

    from pipelines.tracking import mlflow_runs

    client = MlflowClient(server)
    link = mlflow_runs.ui_link(client)
    experiment = project.client.get_experiment_by_name("planes").experiment_id
    run_id = project.client.get_model_version("planes-unet", "1").run_id
    assert (
        mlflow_runs.ui_link(client, run_id)
        == f"{server}/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"
    )
    assert link == f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    page.goto(link)
    page.get_by_text("planes-unet demo_unet").first.wait_for()
    page.get_by_text("planes-det demo_detector").first.wait_for()
    page.screenshot(path=str(tmp_path / "runs.png"))


def test_one_entry_of_bookkeeping_at_most_stands_among_the_models(gated, server, page):
    for model in ("planes-det/1", "planes-unet/1"):
        command = ("promote", model, "--to", "staging", "--data", str(gated.data), "--force", "--reason", "a test")
        gated.registry(*command)
    page.goto(f"{server}/#/models")
    page.get_by_text("planes-unet", exact=True).first.wait_for()
    assert page.get_by_text(re.compile(r"-journal$")).all_inner_texts() == ["planes-journal"]


def test_the_registry_page_shows_version_and_alias(project, server, page):
    project.client.set_registered_model_alias("planes-unet", "shown", "1")
    page.goto(f"{server}/#/models/planes-unet")
    page.get_by_text("Version 1").first.wait_for()
    page.get_by_text("shown").first.wait_for()
