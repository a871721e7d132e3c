"""Scoring with --device auto where there is a GPU, on one that is faked; and in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.engines.composed import ComposedArchitecture, save_composed
from models.loading import load_model
from models.runtime.devices import pick_device
from models.runtime.half_precision import in_precision
from models.runtime.replay import Replayed
from models.saved.folder import save_model
from models.tiling.settings import Tiling
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.inference import is_segmenter, predict_image
from scoring.runners.local import LocalRunner, auto_batch, auto_workers
from scoring.runners.ray_runner import device_in_actor
from tests.gpu import fake_gpu
from tests.models.test_contract import _detector, _mask_rcnn, _segmenter

ENGINES = ["detector", "maskrcnn", "composed", "detectron2", "detectron2 masks"]


def _detectron2(folder, masks):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from models.engines.detectron2.predictor import build_network, detectron2_spec, make_config

    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x" if masks else "COCO-Detection/faster_rcnn_R_50_FPN_3x"
    small = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "INPUT.MIN_SIZE_TEST": 128}
    small |= {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "TEST.DETECTIONS_PER_IMAGE": 10}
    small |= {"MODEL.RPN.POST_NMS_TOPK_TEST": 20, "MODEL.ROI_BOX_HEAD.FC_DIM": 64, "MODEL.FPN.OUT_CHANNELS": 16}
    small |= {"MODEL.ROI_MASK_HEAD.CONV_DIM": 16, "MODEL.ROI_MASK_HEAD.NUM_CONV": 1}
    cfg = make_config(name, small, 1)
    torch.manual_seed(0)
    return save_model(folder, detectron2_spec(name, cfg, ["plane"]), build_network(cfg, "cpu").state_dict())


def _saved(engine, folder):
    if engine == "detector":
        return _detector(folder)
    if engine == "maskrcnn":
        return _mask_rcnn(folder)
    if engine == "composed":
        components = _detector(folder / "d"), _segmenter(folder / "s", network="unet", encoder="resnet18")
        return save_composed(
            folder / "c", *components, ComposedArchitecture(), components={"detector": "d/1", "segmenter": "s/1"}
        )
    return _detectron2(folder, engine.endswith("masks"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(engine):
        if engine not in made:
            made[engine] = _saved(engine, tmp_path_factory.mktemp("models") / engine.replace(" ", "-"))
        return made[engine]

    return get


def _score(folder, data, device, kind="32", tiling=None):
    predictor = load_model(folder, device, tiling)
    runner = LocalRunner(predictor, device, batch_size=auto_batch(device), workers=auto_workers(device, data), kind=kind)
    return [result for _, _, result in runner.results([data.samples])], runner


@pytest.mark.parametrize("engine", ENGINES)
def test_every_model_scores_on_a_gpu_as_on_a_cpu(engine, airfield, saved, monkeypatch):
    data = open_dataset(str(airfield), "test")
    expected, _ = _score(saved(engine), data, "cpu")
    gpu = fake_gpu(monkeypatch)
    results, runner = _score(saved(engine), data, pick_device("auto"))
    assert gpu.moved or gpu.pinned
    assert runner.peak_megabytes()["gpu_memory"] == 5
    for one, other in zip(expected, results, strict=True):
        assert len(one) == len(other)
        assert np.allclose(one.boxes, other.boxes, atol=0.01)
        assert (one.masks is None) == (other.masks is None)


@pytest.mark.parametrize("kind", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_model_scores_in_half_precision(engine, kind, airfield, saved):
    data = open_dataset(str(airfield), "test")
    data = data.subset([data.samples[0].image_id], "one")
    results, _ = _score(saved(engine), data, "cpu", kind)
    full, _ = _score(saved(engine), data, "cpu")
    for half, whole in zip(results, full, strict=True):
        assert half.boxes.dtype == np.float32
        assert np.isfinite(half.scores).all()
        assert (half.masks is None) == (whole.masks is None)
    assert sum(map(len, results))


def test_tiles_are_batched_for_a_gpu(airfield, saved, monkeypatch):
    fake_gpu(monkeypatch)
    data = open_dataset(str(airfield), "test")
    predictor = load_model(saved("detector"), "cuda", Tiling(size=128).model_dump())
    assert predictor.batch == 16
    assert auto_batch("cuda") == 8
    assert sum(map(len, _score(saved("detector"), data, "cuda", tiling={"size": 128})[0]))


def test_an_actor_has_one_gpu_whatever_its_number_outside():
    assert [device_in_actor(d) for d in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda"]


def _networks(predictor):
    return [predictor._probabilities] if is_segmenter(predictor) else predictor.model.modules()


def test_what_accelerate_measures_on_a_gpu_is_what_score_runs_there(airfield, saved, tmp_path, monkeypatch):
    """Of a detector, and of a segmenter in given boxes."""
    folders = saved("detector"), _segmenter(tmp_path / "s", network="unet", encoder="resnet18")
    data = open_dataset(str(airfield), "test")
    # Once before torch.ones is replaced: torch notes for good which functions make tensors.
    whole = [load_model(folder, "cpu") for folder in folders]
    fake_gpu(monkeypatch)
    for folder, on_cpu in zip(folders, whole, strict=True):
        expected, _ = _score(folder, data, "cuda", "bf16-mixed")
        predictor = load_model(folder, "cuda")
        half = in_precision(predictor, "cuda", "bf16-mixed")
        assert is_segmenter(half) == is_segmenter(predictor)
        # Of the detector what has the image's shape alone, of the segmenter all; on a CPU nothing.
        replayed = [sum(isinstance(m, Replayed) for m in _networks(p)) for p in (predictor, load_model(folder, "cpu"))]
        assert replayed == [1 if is_segmenter(predictor) else 2, 0]
        measured = [predict_image(half, s.read(), s) for s in data.samples]
        assert measured == expected
        assert measured != [predict_image(on_cpu, s.read(), s) for s in data.samples]
