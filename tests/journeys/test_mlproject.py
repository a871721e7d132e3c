"""MLproject's entry points in a copy of the project: by `mlflow run` itself, or by the commands that it makes of them."""

from __future__ import annotations

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("mlproject")

# So little training detects planes everywhere, and all of them are outlined.
FEW = "architecture.max_detections=20"
SMALL_UNET = "training.batch_size=2 architecture.crop_size=64"


@pytest.fixture(scope="module")
def copy(project_copy):
    return project_copy


def _mlflow_run(project, entry, *parameters):
    flags = [flag for p in parameters for flag in ("-P", p)]
    return project.run("mlflow", "run", ".", "-e", entry, "--env-manager", "local", "--experiment-name", "planes", *flags)


def _runs(project):
    experiment = project.client.get_experiment_by_name("planes")
    return project.client.search_runs([experiment.experiment_id])


def test_a_model_is_trained_promoted_and_scored_by_mlflow_run(copy):
    data = f"data={copy.data}"
    _mlflow_run(copy, "train_unet", data, "steps=3", "lr=0.001", f"overrides={SMALL_UNET}")
    copy.entry_point("promote", data=copy.data, model="planes-unet/latest")
    _mlflow_run(copy, "score", data, "model=planes-unet/Production", "out=scored")
    assert (copy.folder / "scored" / "planes-unet-1" / "instances.parquet").exists()
    # One run each: the step writes into the run that `mlflow run` opened.
    assert len(_runs(copy)) == 3
    by_task = {r.data.tags.get("task"): r for r in _runs(copy)}
    assert {r.info.status for r in by_task.values()} == {"FINISHED"}
    assert set(by_task) == {"unet", "promote", "score"}
    assert by_task["unet"].data.params["optimizer.lr"] == "0.001"
    assert by_task["unet"].data.tags["mlflow.project.entryPoint"] == "train_unet"
    assert by_task["score"].data.tags["mlflow.project.entryPoint"] == "score"


def test_the_commands_of_the_other_entry_points_run(copy):
    copy.entry_point("prepare_data", out="made", train="2", test="1", size="512")
    assert (copy.folder / "made" / "train_coco.json").exists()
    small = {"data": copy.data, "steps": "2", "overrides": f"training.batch_size=2 window=128 {FEW}"}
    copy.entry_point("train_detector", **small)
    copy.entry_point("train_maskrcnn", **small)
    if not copy.client.search_model_versions("name = 'planes-unet'"):
        copy.entry_point("train_unet", data=copy.data, steps="2", overrides=SMALL_UNET)
    copy.entry_point("compose", data=copy.data)
    copy.entry_point("compare", data=copy.data)
    done = {r.data.tags.get("task") for r in _runs(copy) if r.info.status == "FINISHED"}
    assert {"detector", "maskrcnn", "compose", "compare"} <= done


def test_every_parameter_is_typed_defaulted_and_used(root):
    project = yaml.safe_load((root / "MLproject").read_text())
    training = {"train_unet", "train_detector", "train_maskrcnn", "import_model", "ablate", "compose", "compare"}
    assert set(project["entry_points"]) == {"main", "prepare_data", "promote", "score"} | training
    for name, entry in project["entry_points"].items():
        for key, parameter in entry["parameters"].items():
            assert set(parameter) == {"type", "default"}, (name, key)
            assert f"{{{key}}}" in entry["command"], (name, key)
