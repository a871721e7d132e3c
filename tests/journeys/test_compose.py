"""Detector and U-Net composed through the command: version, tags, scoring, Kaggle CSV, promotion, comparison."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest

from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("versions")


def test_the_version_names_its_parts_and_its_metrics(composed):
    project, said = composed
    assert "planes-inst version 1 from planes-det/1 and outliner/1: test mask_AP" in said
    version = project.client.get_model_version("planes-inst", "1")
    assert (version.tags["detector"], version.tags["segmenter"], version.tags["engine"]) == (
        "planes-det/1",
        "outliner/1",
        "composed",
    )
    run = project.client.get_run(version.run_id)
    assert {"test/AP", "test/mask_AP", "test/at_0.6_mask_AP"} <= set(run.data.metrics)
    assert len(run.inputs.model_inputs) == 2
    model = project.client.get_logged_model(re.search(r"m-\w+", version.source)[0])
    assert "test/mask_AP" in {m.key for m in model.metrics}


def test_it_loads_without_its_parts_and_writes_a_submission(composed, tmp_path):
    project, _ = composed
    data = str(project.data)
    done = project.score("--model", "planes-inst/1", "--data", data, "--out", "inst", "--split", "train+test")
    folder = project.folder / "inst" / "planes-inst-1"
    table = pd.read_parquet(folder / "instances.parquet")
    lines = (folder / "kaggle.csv").read_text().splitlines()
    names = [line.split(",")[0] for line in lines[1:]]
    assert lines[0] == "ImageId,EncodedPixels"
    assert len(table) > 0
    first = [image["file_name"] for image in json.loads((project.data / "train_coco.json").read_text())["images"]]
    ordered = list(dict.fromkeys(names))
    assert ordered[: len(first)] == [name.rpartition("/")[2].removesuffix(".png") for name in first]
    assert len(ordered) == 7
    assert sum(line.split(",")[1] != "[]" for line in lines[1:]) == len(table)
    assert "Evaluation results for segm: airfield train+test" in done.stdout
    evaluated = project.score("evaluate", str(folder / "kaggle.csv"), "--data", data, "--split", "train+test")
    assert "Evaluation results for segm: airfield train+test" in evaluated.stdout
    wrong = project.score("evaluate", str(folder / "kaggle.csv"), "--data", data, code=1)
    assert "is not in airfield/test" in error_line(wrong)


def test_a_table_evaluates_to_what_the_job_said(composed):
    project, _ = composed
    done = project.score("--model", "planes-inst/1", "--data", str(project.data), "--out", "again")
    path = project.folder / "again" / "planes-inst-1" / "instances.parquet"
    evaluated = project.score("evaluate", str(path), "--data", str(project.data))
    tables = [line for line in evaluated.stdout.splitlines() if line.startswith("|")]
    assert tables == [line for line in done.stdout.splitlines() if line.startswith("|")]


def test_it_is_promoted_by_its_masks(composed):
    project, _ = composed
    done = project.step("promote", "--model", "planes-inst/1", "--data", str(project.data))
    assert "planes-inst/1 is production now: 3 gates passed: mask_AP" in done.stdout


def test_parts_that_do_not_fit_end_in_one_line(project):
    swapped = ("--detector", "planes-unet/1", "--segmenter", "planes-det/1", "--data", str(project.data))
    assert "planes-unet/1: is a segmenter, a detector is needed" in error_line(project.step("compose", *swapped, code=1))
    named = ("--detector", "planes-det/1", "--segmenter", "planes-unet/1", "--data", str(project.data), "--name", "a:b")
    assert "'a:b': cannot be the name of a model" in error_line(project.step("compose", *named, code=1))


def test_real_planes_are_submitted_and_read_back(composed, isaid):
    """Kaggle CSV of the real test image, evaluated to the AP of the table."""
    project, _ = composed
    project.score("--model", "planes-inst/1", "--data", str(isaid), "--out", "real", "--score-threshold", "0")
    folder = project.folder / "real" / "planes-inst-1"
    assert len(pd.read_parquet(folder / "instances.parquet")) > 0
    csv = project.score("evaluate", str(folder / "kaggle.csv"), "--data", str(isaid), "--score-threshold", "0").stdout
    table = project.score(
        "evaluate", str(folder / "instances.parquet"), "--data", str(isaid), "--score-threshold", "0"
    ).stdout
    assert csv.splitlines()[1:] == table.partition("Evaluation results for segm")[2].splitlines()[1:]
    shutil.rmtree(folder)


def test_a_version_is_not_promoted_on_images_that_it_was_trained_on(composed, tmp_path):
    """Nor is a composition whose parts were; what they were trained on travels with the versions."""
    project, _ = composed
    data = shutil.copytree(project.data, tmp_path / "airfield")
    content = json.loads((data / "train_coco.json").read_text())
    content["images"] = content["images"][:2]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (data / "train_coco.json").write_text(json.dumps(content))
    train = ("--data", str(data), "--split", "train", "--alias", "judged")
    for model in ("planes-det/1", "outliner/1", "planes-inst/1"):
        done = project.step("promote", "--model", model, *train, code=2)
        assert re.search(r"FAIL +images +airfield/train +none trained on +2 of 2 \(first: A0000\)", done.stdout), (
            done.stdout
        )
        assert "judged" not in project.client.get_registered_model(model.partition("/")[0]).aliases
    shown = project.registry("show", "planes-inst/1").stdout
    assert re.search(r"training images +5\n", shown)
    project.registry("copy", "planes-inst/1", "other-inst")
    done = project.step("promote", "--model", "other-inst/1", *train, code=2)
    assert "2 of 2" in done.stdout
