"""Scoring through the command: every way to name a model and data; outputs; broken input; comparison."""

from __future__ import annotations

import json
import re

import cv2
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_image
from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("journey")


@pytest.fixture(scope="module")
def scored(project):
    """planes-det/1 in production, and what scoring the test set with it said."""
    project.step("promote", "--model", "planes-det/1", "--data", str(project.data))
    done = project.score("--model", "planes-det/Production", "--data", str(project.data), "--out", "out")
    return project, done


def test_outputs_metrics_and_run(scored):
    project, done = scored
    folder = project.folder / "out" / "planes-det-1"
    names = {p.name for p in folder.iterdir()}
    made = {"instances.parquet", "errors.parquet", "coco_results.json", "metrics.json", "overlays"}
    assert names == made | {"manifest.json", "inputs.parquet", "done.json", ".lock", ".logged"}
    table = pq.read_table(folder / "instances.parquet")
    results = json.loads((folder / "coco_results.json").read_text())
    assert table.num_rows == len(results) > 0
    overlay = cv2.imread(str(next((folder / "overlays").iterdir())))
    assert overlay.shape == (512, 512, 3)
    metrics = json.loads((folder / "metrics.json").read_text())[0]
    assert re.search(rf"planes-det/1 +{metrics['metrics']['AP']:.3f}", done.stdout)

    run_id = re.search(r"run ([0-9a-f]{32})", done.stdout)[1]
    run = project.client.get_run(run_id)
    version = project.client.get_model_version("planes-det", "1")
    assert run.data.metrics["test/AP"] == pytest.approx(metrics["metrics"]["AP"])
    assert [i.model_id for i in run.inputs.model_inputs] == [version.source.removeprefix("models:/")]
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.params["data_digest"]
    # For MLflow's grid: the same number is the same image in other scorings of this data.
    pictures = [f.path for f in project.client.list_artifacts(run_id, "images") if f.path.endswith(".png")]
    assert sorted(p.partition("+")[0] for p in pictures) == ["images/overlay_1", "images/overlay_2"]


def test_scoring_gives_the_metrics_that_training_logged(scored):
    project, _ = scored
    logged = json.loads(project.client.get_model_version("planes-det", "1").tags["metrics"])
    scored_now = json.loads((project.folder / "out/planes-det-1/metrics.json").read_text())[0]["metrics"]
    # Training also notes the metrics at a second threshold.
    assert {k: round(v, 4) for k, v in scored_now.items()}.items() <= logged.items()


@pytest.mark.parametrize(
    "model",
    [
        "planes-det/1",
        "planes-det/v1",
        "planes-det/production",
        "planes-det@production",
        "models:/planes-det/1",
        "planes-det/latest",
    ],
)
def test_every_way_to_name_a_version(scored, model):
    project, _ = scored
    done = project.score("--model", model, "--data", str(project.data / "test" / "A0005.png"), "--out", "named")
    assert "planes-det/1:" in done.stdout


def test_a_saved_folder_needs_no_registry(scored, tmp_path):
    project, _ = scored
    folder = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    done = project.score(
        "--model", str(folder), "--data", str(project.data / "test_coco.json"), "--out", str(tmp_path / "o")
    )
    assert "AP50" in done.stdout


def test_two_versions_on_the_same_images_and_again_from_their_runs(scored):
    project, _ = scored
    project.train_detector("--steps", "4")
    arguments = ("--model", "planes-det/1", "--model", "planes-det/2", "--data", str(project.data), "--out", "both")
    done = project.score(*arguments)
    table = (project.folder / "both" / "comparison.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines()] == ["model", "planes-det/1", "planes-det/2"]
    assert "planes-det/2 against planes-det/1, boxes: AP" in done.stdout
    assert (project.folder / "both" / "report.html").exists()
    runs = re.findall(r"outputs in .* run ([0-9a-f]{32})", done.stdout)
    assert len(runs) == 2
    past = project.score("compare", *runs, "--out", "past")
    again = (project.folder / "past" / "comparison.csv").read_text()
    # Speed and size are told too; the metrics are the same.
    assert [line.split(",")[:13] for line in again.splitlines()] == [line.split(",")[:13] for line in table.splitlines()]
    logged = project.client.get_run(re.search(r"report: .*run ([0-9a-f]{32})", past.stdout)[1])
    assert {"planes-det-2/AP_difference", "planes-det-2/AP_difference_low"} <= set(logged.data.metrics)
    assert {f.path for f in project.client.list_artifacts(logged.info.run_id)} == {"report.html", "comparison.csv"}
    other = project.score("--model", "planes-det/1", "--data", str(project.data), "--split", "train", "--out", "train")
    third = re.search(r"run ([0-9a-f]{32})", other.stdout)[1]
    metrics = project.client.get_run(third).data.metrics
    assert "train/AP" in metrics
    assert "test/AP" not in metrics
    message = error_line(project.score("compare", runs[0], third, code=1))
    assert "only equal data can be compared: 2 images only for planes-det/1 (first: " in message
    given = error_line(project.score("compare", runs[0], third, "--data", str(project.data), code=1))
    assert f"run {third}: was made on airfield/train" in given
    training = project.client.get_model_version("planes-det", "1").run_id
    assert "not a scoring run; newest scoring runs:" in error_line(project.score("compare", training, code=1))
    assert "not found" in error_line(project.score("compare", "0" * 32, code=1))
    assert "give --data" in error_line(project.score("compare", "planes-det/1", "planes-det/2", code=1))
    unet = project.score("compare", "planes-unet/1", "planes-det/1", "--data", str(project.data), code=1)
    assert "planes-unet/1: outlines given boxes and finds none" in error_line(unet)


def test_the_unet_is_scored_in_the_true_boxes_and_refuses_data_without(scored, tmp_path):
    project, _ = scored
    done = project.score("--model", "planes-unet/1", "--data", str(project.data), "--out", "crops")
    assert "IoU" in done.stdout
    table = pq.read_table(project.folder / "crops/planes-unet-1/instances.parquet").to_pylist()
    assert all(row["mask_counts"] for row in table)
    # Its boxes are those of the truth; as detections they would be measured as faultless.
    arguments = ("evaluate", "crops/planes-unet-1/instances.parquet", "--data", str(project.data))
    refused = error_line(project.score(*arguments, code=1))
    assert "is of a version that outlines given boxes and finds none" in refused
    run = re.search(r"run ([0-9a-f]{32})", done.stdout)[1]
    refused = error_line(project.score("compare", run, run, "--data", str(project.data), code=1))
    assert f"run {run}: outlines given boxes and finds none" in refused
    write_image(tmp_path / "a.png")
    message = error_line(project.score("--model", "planes-unet/1", "--data", str(tmp_path), code=1))
    assert "segments planes in given boxes and the data has none" in message


def test_a_corrupt_image_is_reported_and_the_others_are_scored(scored, tmp_path):
    project, _ = scored
    write_image(tmp_path / "good one.png", 200, 300)
    (tmp_path / "bad.png").write_bytes((tmp_path / "good one.png").read_bytes()[:500])
    (tmp_path / "empty.jpg").write_bytes(b"")
    done = project.score("--model", "planes-det/1", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "in 1 images, 2 failed (see errors.parquet)" in done.stdout
    failed = pq.read_table(tmp_path / "out/planes-det-1/errors.parquet").to_pylist()
    assert sorted(f["image_id"] for f in failed) == ["bad", "empty"]
    assert all(f["path"] in f["message"] for f in failed)
    alone = project.score(
        "--model", "planes-det/1", "--data", str(tmp_path / "bad.png"), "--out", str(tmp_path / "o"), code=1
    )
    assert "none of 1 images could be scored; the first:" in error_line(alone)


def test_mistakes_are_one_line(scored, tmp_path):
    project, _ = scored
    data = ("--data", str(project.data))
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text('{"a": ')
    (tmp_path / "file").write_text("")
    cases = [
        (("--model", "planes-dett/1", *data), "no registered model 'planes-dett'; did you mean planes-det? registered:"),
        (("--model", "planes-det/Staging", *data), "has no version, alias or stage 'Staging'; versions: 1"),
        (("--model", "planes-det/prodution", *data), "alias or stage 'prodution'; did you mean production? versions: 1"),
        (("--model", "planes-det/1", "--data", str(tmp_path / "emty")), "no such file or folder; did you mean empty?"),
        (("--model", "planes-det/1", "--data", str(tmp_path / "empty")), "no images there"),
        (("--model", "planes-det/1", "--data", str(tmp_path / "absent")), "no such file or folder"),
        (("--model", "planes-det/1", "--data", str(tmp_path / "wrong.json")), "neither COCO"),
        (("--model", "planes-det/1", "--data", str(tmp_path / "broken.json")), "not valid JSON"),
        (("--model", "planes-det/1", *data, "--out", str(tmp_path / "file" / "out")), "cannot be written"),
        (("--model", "planes-det/1", *data, "--device", "cuda:7"), "no CUDA device here"),
    ]
    for arguments, message in cases:
        assert message in error_line(project.score(*arguments, code=1)), arguments
    assert "give at least one --model" in project.score(*data, code=2).stderr
    assert "give --data" in project.score("--model", "planes-det/1", code=2).stderr


def test_scripts_read_one_object(scored):
    project, _ = scored
    data = ("--data", str(project.data))
    # A program of its own: what libraries write past Python would be seen.
    done = project.score("--model", "planes-det/1", *data, "--out", "json", "--json", real=True, timeout=200)
    told = json.loads(done.stdout)
    assert (told["command"], told["exit_code"], told["error"]) == ("score", 0, None)
    (job,) = told["jobs"]
    assert (job["version"], job["folder"], job["images"], job["failed"]) == ("planes-det/1", "json/planes-det-1", 2, 0)
    assert project.client.get_run(job["run_id"]).data.metrics["test/AP"] == pytest.approx(job["metrics"]["AP"])
    assert f"run {job['run_id']}" in done.stderr
    assert project.score("--model", "planes-det/1", *data, "--out", "json", "--quiet").stdout == ""

    done = project.score("compare", "json/planes-det-1", "planes-det/1", *data, "--out", "held", "--json")
    told = json.loads(done.stdout)
    assert (project.folder / told["report"]).is_file()
    assert [one["model"] for one in told["versions"]] == ["planes-det-1", "planes-det/1"]
    assert told["differences"][0]["difference"] == 0
    # How to look at each job, on the page and on the terminal too.
    for view in told["views"].values():
        assert view.startswith("score view ")
        assert view in done.stderr
        assert view in (project.folder / told["report"]).read_text()
    assert told["views"]["planes-det-1"] == f"score view json/planes-det-1 --data {project.data}/test_coco.json"

    table = "json/planes-det-1/instances.parquet"
    told = json.loads(project.score("evaluate", table, *data, "--json").stdout)
    assert told["metrics"]["AP"] == pytest.approx(job["metrics"]["AP"])
    told = json.loads(project.score("export", "json/planes-det-1", "--to", "geojson,coco", "--json").stdout)
    assert told["planes"] == job["planes"]
    told = json.loads(project.score("--model", "planes-dte/1", *data, "--json", code=1).stdout)
    assert (told["exit_code"], "did you mean planes-det?" in told["error"]) == (1, True)

    told = json.loads(project.registry("promote", "planes-det/1", "--to", "production", *data, "--json").stdout)
    assert (told["exit_code"], told["passed"], told["candidate"], told["moved"]) == (0, True, "planes-det/1", False)
    gate = project.folder / "strict.yaml"
    gate.write_text("gates: {production: {}, strict: {metrics: {AP: {minimum: 0.999}}}}\n")
    call = ("promote", "planes-det/1", "--to", "strict", "--gates", str(gate), *data, "--json")
    told = json.loads(project.registry(*call, code=2).stdout)
    assert (told["exit_code"], told["error"]) == (2, "a gate failed; the alias was not moved")
    assert [check["passed"] for check in told["checks"] if check["metric"]] == [False]
    # A new alias with a name that is nearly another's is made, and the mistake told.
    said = project.registry("promote", "planes-det/1", "--to", "prodution", "--dry-run", "--gates", str(gate), *data).stdout
    assert "planes-det: prodution is a new alias; did you mean production?" in said
    told = json.loads(project.registry("verify", "planes-det/1", "--json").stdout)
    assert {one["passed"] for one in told["findings"]} <= {True, None}


def test_an_ap_carries_the_threshold_it_was_made_at(project):
    done = project.score(
        "--model", "planes-det/1", "--data", str(project.data), "--out", "high", "--score-threshold", "0.6"
    )
    assert "Evaluation results for bbox: airfield test, 2 images, score >= 0.6, maxDets 100" in done.stdout
    content = json.loads((project.folder / "high" / "planes-det-1" / "metrics.json").read_text())
    assert content[0]["settings"]["score_threshold"] == 0.6
