"""MLproject's entry points in a copy of the project: by `mlflow run` itself, or by the commands that it makes of them."""

from __future__ import annotations

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("mlproject")

# So little training detects planes everywhere, and all of them are outlined.
FEW = "architecture.max_detections=20"
SMALL_UNET = "training.batch_size=2 architecture.crop_size=64 architecture.flips=false"


@pytest.fixture(scope="module")
def copy(project_copy):
    return project_copy


def _mlflow_run(project, entry, *parameters):
    flags = [flag for p in parameters for flag in ("-P", p)]
    return project.run("mlflow", "run", ".", "-e", entry, "--env-manager", "local", "--experiment-name", "planes", *flags)


def _runs(project):
    experiment = project.client.get_experiment_by_name("planes")
    return project.client.search_runs([experiment.experiment_id]) if experiment else []


# How the score command itself joins the run that `mlflow run` opened is tried by it in `make soak`.
@pytest.mark.parametrize("by_mlflow", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_model_is_trained_promoted_and_scored(copy, by_mlflow):
    known, out = {r.info.run_id for r in _runs(copy)}, f"scored-{by_mlflow}"
    _mlflow_run(copy, "train_unet", f"data={copy.data}", "steps=3", "lr=0.001", f"overrides={SMALL_UNET}")
    copy.entry_point("promote", data=copy.data, model="planes-unet/latest", min_gain="-1")
    if by_mlflow:
        _mlflow_run(copy, "score", f"data={copy.data}", "model=planes-unet/Production", f"out={out}")
    else:
        copy.entry_point("score", data=copy.data, model="planes-unet/Production", out=out)
    assert list((copy.folder / out).glob("planes-unet-*/instances.parquet"))
    # One run each: the step writes into the run that `mlflow run` opened.
    made = [r for r in _runs(copy) if r.info.run_id not in known]
    assert len(made) == 3
    by_task = {r.data.tags.get("task"): r for r in made}
    assert {r.info.status for r in by_task.values()} == {"FINISHED"}
    assert set(by_task) == {"unet", "promote", "score"}
    assert by_task["unet"].data.params["optimizer.lr"] == "0.001"
    assert by_task["unet"].data.tags["mlflow.project.entryPoint"] == "train_unet"
    assert by_task["score"].data.tags.get("mlflow.project.entryPoint") == ("score" if by_mlflow else None)


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
