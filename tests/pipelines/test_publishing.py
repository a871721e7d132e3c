"""Trained weights are registered whatever becomes of their evaluation; what it would refuse is said before training."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import DataError
from models.saved.folder import save_model
from pipelines.data.readers.opening import open_dataset
from pipelines.registry import registration
from pipelines.registry.model_versions import Registry
from pipelines.tracking import mlflow_runs
from pipelines.use_cases import publishing
from pipelines.use_cases.requests import TrainingRequest
from pipelines.use_cases.training import plan_training
from tests.pipelines.test_outlines import _write
from tests.stores import new_store


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A saved segmenter, and a store in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    monkeypatch.delenv("PLANES_TRACEBACK", raising=False)
    architecture = SegmenterArchitecture(network="skipnet", crop_size=64)
    return save_model("m", segmenter_spec(architecture, ["plane"]), build_segmenter(architecture).state_dict())


@pytest.fixture
def registry(saved, tmp_path):
    """A store in the working folder."""
    return Registry.connect(new_store(tmp_path / "mlflow.db"))


def test_an_evaluation_that_fails_loses_no_weights(registry, saved, tmp_path, monkeypatch):
    train = _write(tmp_path / "d", split="train")
    what = publishing.Publication(saved, "kept", np.zeros((64, 64, 3), np.uint8), train, test=_write(tmp_path / "d"))
    real = publishing.evaluate_with_sheet

    def breaks(*_):
        raise ZeroDivisionError("odd data")

    with mlflow_runs.tracked_run(registry.client, "a run", {}) as run:
        monkeypatch.setattr(publishing, "evaluate_with_sheet", breaks)
        with pytest.raises(DataError, match=r"kept/1 is registered, but its evaluation failed \(d/test: odd data\)"):
            publishing.publish(registry, what, run.info.run_id, device="cpu")
        version = registry.client.get_model_version("kept", "1")
        assert version.tags["evaluation"] == "d/test: odd data"
        assert json.loads(version.tags["metrics"]) == {}
        assert registry.find_trained("kept", "none") is None
        # The same command, the same run: evaluated now, and no second version.
        monkeypatch.setattr(publishing, "evaluate_with_sheet", real)
        number, metrics = publishing.publish(registry, what, run.info.run_id, device="cpu")
    version = registry.client.get_model_version("kept", number)
    assert (number, version.tags["evaluation"]) == ("1", "complete")
    assert json.loads(version.tags["metrics"])["IoU"] == pytest.approx(metrics["IoU"], abs=1e-4)


def test_a_kill_before_the_metrics_are_logged_leaves_no_complete_version(registry, saved, tmp_path, monkeypatch):
    what = publishing.Publication(saved, "cut", np.zeros((64, 64, 3), np.uint8), test=_write(tmp_path / "d"))
    real = mlflow_runs.log_evaluation

    def killed(*_, **__):
        raise KeyboardInterrupt

    with mlflow_runs.tracked_run(registry.client, "a run", {}) as run:
        monkeypatch.setattr(mlflow_runs, "log_evaluation", killed)
        with pytest.raises(KeyboardInterrupt):
            publishing.publish(registry, what, run.info.run_id, device="cpu")
        assert registry.client.get_model_version("cut", "1").tags["evaluation"] == "not logged yet"
        monkeypatch.setattr(mlflow_runs, "log_evaluation", real)
        assert publishing.publish(registry, what, run.info.run_id, device="cpu")[0] == "1"
    assert registry.client.get_model_version("cut", "1").tags["evaluation"] == "complete"


def test_a_version_that_was_not_evaluated_is_not_reused(registry, saved, monkeypatch):
    what = publishing.Publication(saved, "reused", np.zeros((64, 64, 3), np.uint8), tags={"training_key": "k"})
    with mlflow_runs.tracked_run(registry.client, "a run", {}) as run:
        publishing.publish(registry, what, run.info.run_id, device="cpu")
    assert registry.find_trained("reused", "k") is not None
    registry.client.set_model_version_tag("reused", "1", "evaluation", "d/test: odd data")
    assert registry.find_trained("reused", "k") is None


def test_images_without_planes_end_no_publication(registry, saved, tmp_path):
    empty = _write(tmp_path / "d", planes=0)
    what = publishing.Publication(saved, "empty", np.zeros((64, 64, 3), np.uint8), test=empty)
    with mlflow_runs.tracked_run(registry.client, "a run", {}) as run:
        number, metrics = publishing.publish(registry, what, run.info.run_id, device="cpu")
    assert (number, {k for k in metrics if k in ("IoU", "AP")}) == ("1", set())


def _request(task, recipe, folder):
    return TrainingRequest(
        task=task,
        recipe=recipe,
        data=str(folder),
        register_as="m",
        device="cpu",
        overrides=("data.val_fraction=0",),
        work_dir=str(folder / "w"),
    )


@pytest.mark.parametrize(("recipe", "kept"), [("unet_scratch", False), ("detector_scratch", True)])
def test_data_that_a_training_cannot_be_measured_on_is_said_before_it(recipe, kept, tmp_path, caplog):
    _write(tmp_path, split="train")
    _write(tmp_path, spoilt=set(range(8)))
    task = "unet" if "unet" in recipe else "detector"
    request = _request(task, recipe, tmp_path)
    with caplog.at_level("INFO"):
        plan = plan_training(request)
    assert (plan.data.test is not None) == kept
    said = "no test metrics: " in caplog.text
    assert said != kept


def test_some_outlines_are_enough(tmp_path):
    _write(tmp_path, split="train", spoilt={0})
    _write(tmp_path, spoilt={1, 2})
    request = _request("unet", "unet_scratch", tmp_path)
    assert plan_training(request).data.test.planes == 8
    assert open_dataset(tmp_path, "test").without_outline == 2


def test_requirements_name_the_package_that_holds_opencv(monkeypatch):
    def installed(name):
        if name in ("opencv-python", "rasterio"):
            raise PackageNotFoundError(name)
        return "5.0"

    monkeypatch.setattr(registration, "installed", installed)
    names = ("numpy", "opencv-python", "rasterio")
    assert [*map(registration._requirement, names)] == ["numpy==5.0", "opencv-python-headless==5.0", "rasterio"]
