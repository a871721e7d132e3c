"""Detectron2 in mixed precision: two steps of each task, stopped and gone on to the same weights; its 2021 release."""

from __future__ import annotations

import math
import os

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.utils.events import EventStorage
from torch import nn

from models.errors import RecipeError
from models.saved.folder import read_weights
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.training.detectron2 import trainer as detectron2_trainer
from pipelines.training.detectron2.precision import MixedTrainer, amp_precision
from pipelines.training.detectron2.trainer import train_detectron2
from tests.gpu import fake_gpu

SMALL = ["SOLVER.MAX_ITER=3", "SOLVER.IMS_PER_BATCH=2", "SOLVER.CHECKPOINT_PERIOD=1", "TEST.EVAL_PERIOD=0", "window=128"]


class Killed:
    def __init__(self, at=None):
        self.at = at

    def on_start(self, history, total):
        self.begun = len(history)

    def on_step(self, record):
        if record["step"] == self.at:
            raise SystemError("killed")

    def on_checkpoint(self, history):
        pass


@pytest.fixture(scope="module")
def data(airfield):
    return open_dataset(str(airfield), "train"), None


@pytest.mark.parametrize(
    "name", ["demo_detector_detectron2", pytest.param("demo_maskrcnn_detectron2", marks=pytest.mark.soak)]
)
def test_each_task_trains_in_bfloat16_and_goes_on_to_the_same_weights(name, data, tmp_path):
    recipe = load_recipe(name, [*SMALL, "SOLVER.AMP.ENABLED=true"])
    whole, first = train_detectron2(recipe, *data, folder=tmp_path / "whole", device="cpu")
    with pytest.raises(Exception, match="killed"):
        train_detectron2(recipe, *data, folder=tmp_path / "parts", device="cpu", listeners=[Killed(at=3)])
    listener = Killed()
    resumed, second = train_detectron2(recipe, *data, folder=tmp_path / "parts", device="cpu", listeners=[listener])
    assert listener.begun == 2
    assert [r["train/loss"] for r in second.history] == [r["train/loss"] for r in first.history]
    a, b = read_weights(whole), read_weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    full = train_detectron2(load_recipe(name, SMALL), *data, folder=tmp_path / "full", device="cpu")[1].history
    assert full[0]["train/loss"] != first.history[0]["train/loss"]
    assert full[0]["train/loss"] == pytest.approx(first.history[0]["train/loss"], rel=0.1)


def test_a_gpu_without_bfloat16_is_given_float16(monkeypatch):
    for capability, kind in {(7, 5): "16-mixed", (8, 0): "bf16-mixed"}.items():
        with monkeypatch.context() as patched:
            fake_gpu(patched, capability)
            assert amp_precision("cuda") == kind
    assert amp_precision("cpu") == "bf16-mixed"


class _Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.spoil = False

    def forward(self, x):
        value = self.inner(x).square().mean()
        return {"loss_a": value * (torch.tensor(3e38) if self.spoil else 1)}


def _stepper(lr=0.1):
    torch.manual_seed(0)
    model = _Toy()
    inputs = [torch.randn(4, 3) * 0.1 for _ in range(40)]
    trainer = MixedTrainer(model, inputs, torch.optim.SGD(model.parameters(), lr=lr), "cpu", "16-mixed")
    trainer.iter = 0
    return trainer


def test_float16_passes_over_infinite_gradients_and_keeps_its_scale(monkeypatch):
    trainer = _stepper()
    with EventStorage(0) as storage:
        before = trainer.model.inner.weight.clone()
        trainer.model.spoil = True
        trainer.run_step()
        assert torch.equal(trainer.model.inner.weight, before)
        assert storage.latest()["[metric]grad_scaler"][0] == 65536 / 2
        trainer.model.spoil = False
        trainer.run_step()
        assert not torch.equal(trainer.model.inner.weight, before)
        other = _stepper()
        other.load_state_dict(trainer.state_dict())
        assert other.grad_scaler.get_scale() == 65536 / 2
        state = trainer.state_dict()
        del state["grad_scaler"]
        _stepper().load_state_dict(state)
        trainer.model.spoil = True
        with pytest.raises(FloatingPointError, match="Gradients are not finite"):
            for _ in range(30):
                trainer.run_step()


def test_a_resumed_training_begins_with_its_own_batch_whenever_the_iterator_was_asked_for(data, tmp_path):
    """Detectron2 0.6 of 2021, which conda-forge has, asks for it before the checkpoint is read."""

    class Steps:
        def __len__(self):
            return 5

        def __getitem__(self, step):
            return step

    inputs = detectron2_trainer._FromStart(Steps(), 5, 0)
    asked_early = iter(inputs)
    inputs.start = 3
    assert list(asked_early) == [3, 4]


def test_it_trains_on_a_gpu(data, tmp_path, monkeypatch):
    gpu = fake_gpu(monkeypatch)
    recipe = load_recipe("demo_detector_detectron2", [*SMALL, "SOLVER.AMP.ENABLED=true", "DATALOADER.NUM_WORKERS=0"])
    saved, outcome = train_detectron2(recipe, *data, folder=tmp_path, device="cuda")
    assert all(math.isfinite(r["train/loss"]) for r in outcome.history)
    assert gpu.moved
    assert saved.is_dir()


def test_processes_on_the_cpu_see_no_gpu(data, tmp_path, monkeypatch):
    """Detectron2's launcher would let them talk through NCCL, which knows no tensors on the CPU."""
    import detectron2.engine

    seen = []

    def launch(work, count, dist_url, args):
        seen.append((count, os.environ.get("CUDA_VISIBLE_DEVICES")))
        (tmp_path / detectron2_trainer.OUTCOME).write_text('{"step": 1, "best": null, "history": []}')

    monkeypatch.setattr(detectron2.engine, "launch", launch)
    recipe = load_recipe("demo_detector_detectron2", SMALL)
    for before in ("0,1", None):
        with monkeypatch.context() as patched:
            if before is None:
                patched.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            else:
                patched.setenv("CUDA_VISIBLE_DEVICES", before)
            train_detectron2(recipe, *data, folder=tmp_path, device="cpu", num_gpus=2)
            train_detectron2(recipe, *data, folder=tmp_path, device="cpu")
            assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    assert seen == [(2, ""), (1, "0,1"), (2, ""), (1, None)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match="takes the first 2 GPUs; use --device cuda"):
        train_detectron2(recipe, *data, folder=tmp_path, device="cuda:1", num_gpus=2)


@pytest.mark.soak
def test_two_processes_share_a_batch_in_bfloat16(data, tmp_path):
    recipe = load_recipe("demo_detector_detectron2", [*SMALL, "SOLVER.MAX_ITER=2", "SOLVER.AMP.ENABLED=true"])
    outcome = train_detectron2(recipe, *data, folder=tmp_path, device="cpu", num_gpus=2)[1]
    assert [r["step"] for r in outcome.history] == [1, 2]
    assert all(math.isfinite(r["train/loss"]) for r in outcome.history)
