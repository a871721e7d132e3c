"""Both engines through the user's door: train, register, promote, score; Mask R-CNN; import; thresholds."""

from __future__ import annotations

import importlib.util
import json

import pandas as pd
import pytest
import torch

from tests.journeys.conftest import Project, error_line

pytestmark = [pytest.mark.xdist_group("engines"), pytest.mark.slow]

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
needs_detectron2 = pytest.mark.skipif(not HAS_DETECTRON2, reason="Detectron2 is not installed")

TINY = ("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "4")
# Untrained networks answer with scores below the usual threshold.
LOW = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20")


@pytest.fixture(scope="module")
def project(tmp_path_factory, airfield):
    """A working folder without any model."""
    return Project(tmp_path_factory.mktemp("engines"), airfield)


def _train(project, step, *arguments, **options):
    return project.step(step, "--data", str(project.data), *arguments, **options)


@needs_detectron2
@pytest.mark.parametrize(("step", "name"), [("train_detector", "d2-det"), ("train_maskrcnn", "d2-mask")])
def test_detectron2_trains_registers_promotes_and_scores(project, step, name):
    data = str(project.data)
    done = _train(project, step, "--engine", "detectron2", "--name", name, "--set", "window=128", *TINY, *LOW)
    assert "Evaluation results for bbox: airfield test, 2 images, score >= 0.05, maxDets 100" in done.stdout
    assert ("Evaluation results for segm" in done.stdout) == (name == "d2-mask")
    version = project.client.get_model_version(name, "1")
    assert version.tags["engine"] == "detectron2"
    run = project.client.get_run(version.run_id)
    assert {"train/loss", "train/loss_rpn_cls", "lr", "seconds/data", "seconds/iteration", "val/AP", "test/AP"} <= set(
        run.data.metrics
    )
    assert len(project.client.get_metric_history(version.run_id, "train/loss_rpn_loc")) == 4
    assert run.data.params["opts.SOLVER.MAX_ITER"] == "4"
    files = {f.path for f in project.client.list_artifacts(version.run_id)}
    assert {"detectron2.log", "detectron2_config.yaml", "recipe.yaml", "figures"} <= files
    if name == "d2-det":
        promoted = project.step("promote", "--model", f"{name}/1", "--data", data)
        assert f"{name}/1 is production now" in promoted.stdout
    which = "Production" if name == "d2-det" else "1"
    project.score("--model", f"{name}/{which}", "--data", data, "--out", name, "--score-threshold", "0")
    table = pd.read_parquet(project.folder / name / f"{name}-1" / "instances.parquet")
    assert len(table) > 0
    assert table["mask_counts"].notna().all() == (name == "d2-mask")


@pytest.mark.soak
@needs_detectron2
def test_a_killed_detectron2_training_goes_on(project):
    """Killed after a checkpoint, the same command finishes it in the same run, no iteration told twice."""
    import subprocess
    import time

    command = ["python", "-m", "pipelines.steps.train_detector", "--data", str(project.data), "--engine", "detectron2"]
    command += ["--name", "d2-killed", "--set", "window=128", *TINY, "SOLVER.MAX_ITER", "30"]
    process = subprocess.Popen(
        command, cwd=project.folder, env=project.env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not list(project.folder.glob(".planes/training/d2-killed-*/last_checkpoint")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    done = project.run(*command)
    assert "going on from step" in done.stdout
    run_id = project.client.get_model_version("d2-killed", "1").run_id
    steps = [p.step for p in project.client.get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 31))
    assert project.client.get_run(run_id).info.status == "FINISHED"


@needs_detectron2
def test_weights_of_a_detectron2_training_are_imported(project, tmp_path):
    from models.engines.detectron2.predictor import build_network
    from pipelines.recipes.reading import load_recipe
    from pipelines.training.detectron2.trainer import training_config

    cfg = training_config(load_recipe("demo_detector_detectron2"), tmp_path, "cpu")
    torch.save({"model": build_network(cfg, "cpu").state_dict(), "iteration": 9}, tmp_path / "model_final.pth")
    common = ("--recipe", "demo_detector", "--engine", "detectron2", "--data", str(project.data), "--name", "imported")
    done = project.step("import_model", "--weights", str(tmp_path / "model_final.pth"), *common)
    assert "imported version 1: test AP" in done.stdout
    tags = project.client.get_model_version("imported", "1").tags
    assert (tags["engine"], tags["data"]) == ("detectron2", "unknown")
    wrong = project.step(
        "import_model", "--weights", str(tmp_path / "model_final.pth"), *common, "MODEL.ROI_BOX_HEAD.FC_DIM", "64", code=1
    )
    assert "not of this network" in error_line(wrong)


def test_torchvision_mask_rcnn_trains_registers_and_scores(project):
    tiny = "window=128 training.batch_size=2 training.evaluate_every=4 training.checkpoint_every=2"
    tiny += " architecture.score_threshold=0 architecture.max_detections=20"
    done = _train(project, "train_maskrcnn", "--steps", "4", "--set", tiny)
    assert "planes-mask version 1: test mask_AP" in done.stdout
    run = project.client.get_run(project.client.get_model_version("planes-mask", "1").run_id)
    assert {"train/loss_mask", "val/mask_AP", "val/best_mask_AP", "test/mask_AP", "test/AP", "test/at_0.6_mask_AP"} <= set(
        run.data.metrics
    )
    project.step("promote", "--model", "planes-mask/1", "--data", str(project.data))
    project.score("--model", "planes-mask/production", "--data", str(project.data), "--out", "masks")
    content = json.loads((project.folder / "masks" / "planes-mask-1" / "metrics.json").read_text())
    assert [c["settings"]["kind"] for c in content] == ["bbox", "segm"]


def test_without_detectron2_one_line_says_how_to_get_it(project, monkeypatch):
    """As where Detectron2 is absent, installed here or not."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name.split(".")[0] == "detectron2" else find(name, *more)
    )
    done = _train(project, "train_detector", "--recipe", "course_det_default", code=1)
    line = error_line(done)
    assert "Detectron2 is not installed" in line
    assert "conda install -c conda-forge detectron2" in line


def test_a_version_of_an_absent_engine_says_what_it_needs(project, tmp_path):
    from models.engines.detectron2.predictor import Detectron2Architecture
    from models.errors import EngineMissing
    from models.loading import load_model
    from models.saved.folder import save_model
    from models.saved.spec import ModelSpec

    if HAS_DETECTRON2:
        pytest.skip("Detectron2 is installed")
    architecture = Detectron2Architecture(config="COCO-Detection/faster_rcnn_R_50_FPN_1x", settings={})
    spec = ModelSpec(kind="detector", engine="detectron2", architecture=architecture.model_dump(), classes=["plane"])
    with pytest.raises(EngineMissing, match="conda install"):
        load_model(save_model(tmp_path / "m", spec, {"a": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "demo_detector", "SOLVER.BASE_LR", "1"), "opts are Detectron2's settings"),
        (("SOLVER.BASE_LR",), "expected pairs of KEY VALUE"),
        (("--num-gpus", "99"), "--num-gpus 99: more than the"),
        (("--num-gpus", "2", "--device", "cpu", "--batch-size", "1"), "--num-gpus 2: more than the 1 images of a batch"),
        (("--recipe", "detector", "--engine", "detectron2"), "for detectron2 there are course_det_default"),
    ],
)
def test_mistakes_end_in_one_line(project, arguments, message):
    from click.testing import CliRunner

    from pipelines.steps.train_detector import main

    done = CliRunner().invoke(main, ["--data", str(project.data), *arguments])
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    assert message in lines[0]
