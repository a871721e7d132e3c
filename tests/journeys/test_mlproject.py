"""`mlflow run` of every entry point inside this Python, in a copy of the project."""

from __future__ import annotations

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("mlproject")


@pytest.fixture(scope="module")
def copy(project_copy):
    return project_copy


def _run(project, entry, *parameters):
    flags = [flag for p in parameters for flag in ("-P", p)]
    return project.run("mlflow", "run", ".", "-e", entry, "--env-manager", "local", "--experiment-name", "planes", *flags)


def test_the_line_through_mlflow_run(copy):
    _run(copy, "prepare_data", "out=made", "train=2", "test=1", "size=512")
    assert (copy.folder / "made" / "train_coco.json").exists()
    data = f"data={copy.data}"
    small = "overrides=training.batch_size=2 architecture.crop_size=64"
    _run(copy, "train_unet", data, "steps=3", "lr=0.001", small)
    _run(copy, "train_detector", data, "steps=3", "overrides=training.batch_size=2 window=128")
    _run(copy, "train_maskrcnn", data, "steps=2", "overrides=training.batch_size=2 window=128")
    _run(copy, "promote", data, "model=planes-det/latest")
    _run(copy, "score", data, "model=planes-det/Production", "out=scored")
    assert (copy.folder / "scored" / "planes-det-1" / "instances.parquet").exists()
    experiment = copy.client.get_experiment_by_name("planes")
    runs = copy.client.search_runs([experiment.experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    by_task = {r.data.tags.get("task"): r for r in runs}
    assert {"unet", "detector", "maskrcnn", "promote", "score"} <= set(by_task)
    # One run each: the step writes into the run that `mlflow run` opened.
    assert len(runs) == 6
    assert by_task["unet"].data.params["optimizer.lr"] == "0.001"
    assert by_task["unet"].data.tags["mlflow.project.entryPoint"] == "train_unet"


def test_every_parameter_is_typed_defaulted_and_used(root):
    project = yaml.safe_load((root / "MLproject").read_text())
    training = {"train_unet", "train_detector", "train_maskrcnn", "import_model", "ablate", "compose", "compare"}
    assert set(project["entry_points"]) == {"main", "prepare_data", "promote", "score"} | training
    for name, entry in project["entry_points"].items():
        for key, parameter in entry["parameters"].items():
            assert set(parameter) == {"type", "default"}, (name, key)
            assert f"{{{key}}}" in entry["command"], (name, key)
