"""Training with --device auto where there is a GPU, on one that is faked."""

from __future__ import annotations

import math

import pytest
import torch

from models.loading import load_model
from models.runtime.devices import pick_device
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.training import loop
from pipelines.training.detector import train_detector
from pipelines.training.loop import CHECKPOINT, step_loader
from pipelines.training.unet import train_unet
from tests.gpu import fake_gpu

SMALL = ["training.steps=2", "training.epochs=null", "training.checkpoint_every=1", "training.batch_size=2"]
SMALL += ["training.evaluate_every=1"]
# Most CPUs have no instructions for float16: a step of a ResNet takes a quarter of a minute.
MOBILE = ["window=128", "architecture.backbone=mobilenet_v3_small", "architecture.norm=batch"]
RECIPES = {
    "demo_unet": ["architecture.crop_size=32", "training.precision=auto"],
    "demo_detector": MOBILE,
    "demo_maskrcnn": [*MOBILE, "architecture.mask_channels=16"],
}


@pytest.fixture(scope="module")
def data(airfield):
    test = open_dataset(str(airfield), "test")
    return open_dataset(str(airfield), "train"), test.subset([test.samples[0].image_id], "val")


def _train(name, data, folder, device, *more):
    recipe = load_recipe(name, [*SMALL, *RECIPES[name], *more])
    train = train_unet if recipe.task == "unet" else train_detector
    return train(recipe, *data, folder=folder, device=device)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("demo_unet", (8, 0)),
        ("demo_detector", (8, 0)),
        ("demo_maskrcnn", (8, 0)),
        ("demo_detector", (7, 5)),
        *(pytest.param(name, (7, 5), marks=pytest.mark.soak) for name in ("demo_unet", "demo_maskrcnn")),
    ],
)
def test_every_task_trains_on_a_gpu(name, capability, data, tmp_path, monkeypatch):
    gpu = fake_gpu(monkeypatch, capability)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    processes = []
    monkeypatch.setattr(loop, "step_loader", lambda *given: processes.append(given[-1]) or step_loader(*given))
    device = pick_device("auto")
    assert device == "cuda"
    saved, outcome = _train(name, data, tmp_path, device)
    assert [r["step"] for r in outcome.history] == [1, 2]
    assert all(math.isfinite(r["train/loss"]) for r in outcome.history)
    assert ("loss_scale" in outcome.history[0]) == (capability < (8, 0))
    assert gpu.moved
    assert gpu.pinned
    assert processes == [2]
    monkeypatch.undo()
    # What prediction does to a network for the GPU's sake must not get into its weights.
    load_model(saved)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its files can be read")
def test_what_a_gpu_left_is_ended_on_a_cpu(data, tmp_path, monkeypatch):
    """Tensors in the files say that they come from a GPU, which is not there any more."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        first = _train("demo_unet", data, tmp_path, "cpu")[1]
    assert (tmp_path / CHECKPOINT).exists()
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / CHECKPOINT, weights_only=True)
    again = _train("demo_unet", data, tmp_path, "cpu")[1]
    assert again.history == first.history
    assert all(torch.equal(v, again.weights[k]) for k, v in first.weights.items())
