"""Mixed precision in training, on the CPU as far as it goes: every task learns, stops and goes on to the same weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import ModelError, RecipeError
from models.runtime import instructions
from models.runtime.devices import pick_device, pick_precision
from models.saved.folder import read_weights
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.recipes.settings import TrainingSettings
from pipelines.training.detector import train_detector
from pipelines.training.loop import CHECKPOINT, pick_workers, run
from pipelines.training.unet import segmenter_loss, train_unet
from pipelines.use_cases.training import TrainingRequest, plan_training
from tests.pipelines.test_gpu_training import MOBILE
from tests.pipelines.test_loop import _job, _Stop

SMALL = ["training.steps=3", "training.epochs=null", "training.checkpoint_every=1", "training.evaluate_every=2"]
TASKS = {
    "unet": ("demo_unet", ["architecture.crop_size=64"]),
    "skipnet": ("demo_unet", ["architecture.network=skipnet", "architecture.crop_size=64"]),
    "detector": ("demo_detector", ["window=128"]),
    "maskrcnn": ("demo_maskrcnn", ["window=128"]),
    "small_unet": ("demo_unet", ["architecture.crop_size=32"]),
    "mobile": ("demo_detector", MOBILE),
}


@pytest.fixture(scope="module")
def data(airfield):
    test = open_dataset(str(airfield), "test")
    return open_dataset(str(airfield), "train"), test.subset([test.samples[0].image_id], "val")


def _train(task, kind, data, folder, stop=None, device="cpu"):
    name, more = TASKS[task]
    recipe = load_recipe(name, [*SMALL, *more, "training.batch_size=2", f"training.precision={kind}"])
    train = train_unet if recipe.task == "unet" else train_detector
    return train(recipe, *data, folder=folder, device=device, listeners=[stop] if stop else [])


# A Mask R-CNN has all that a detector has.
@pytest.mark.parametrize(
    "task", ["unet", "maskrcnn", *(pytest.param(t, marks=pytest.mark.soak) for t in ("skipnet", "detector"))]
)
def test_every_task_trains_in_bfloat16_and_goes_on_to_the_same_weights(task, data, tmp_path):
    whole, first = _train(task, "bf16-mixed", data, tmp_path / "whole")
    with pytest.raises(SystemError):
        _train(task, "bf16-mixed", data, tmp_path / "parts", _Stop(at=2))
    resumed, second = _train(task, "bf16-mixed", data, tmp_path / "parts")
    assert [r["step"] for r in first.history] == [1, 2, 3]
    assert first.history == second.history
    a, b = read_weights(whole), read_weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    # It is half precision, and the weights are not.
    full = _train(task, "32", data, tmp_path / "full")[1].history
    assert full[0]["train/loss"] != first.history[0]["train/loss"]
    assert full[0]["train/loss"] == pytest.approx(first.history[0]["train/loss"], rel=0.1)
    assert {v.dtype for v in a.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("task", ["small_unet", pytest.param("mobile", marks=pytest.mark.soak)])
def test_every_task_trains_in_float16(task, data, tmp_path):
    history = _train(task, "16-mixed", data, tmp_path)[1].history
    assert [r["step"] for r in history] == [1, 2, 3]
    assert all(r["loss_scale"] >= 1 for r in history)


def _scaled_job(folder, stop=None, bad=(), bad_value=float("inf"), **training):
    """A job in float16 whose gradients are not finite at some steps, while its loss is."""
    job = _job(folder, stop, **{"precision": "16-mixed", **training})
    plain = job.loss
    steps = iter(range(100))

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * bad_value

    def loss(model, batch, device):
        step = len(stop.seen) if stop is not None else next(steps)
        # Small enough not to overflow by itself once it is scaled.
        value = plain(model, batch, device)["a"] * 0.01
        return {"a": Spoilt.apply(value)} if step in bad else {"a": value}

    job.loss = loss
    return job


class _Counting(_Stop):
    def __init__(self, at):
        super().__init__(at)
        self.seen = []

    def on_start(self, history, total):
        self.seen = list(history)

    def on_step(self, record):
        self.seen.append(record)
        super().on_step(record)


def test_the_scale_of_the_gradients_outlives_a_stop(tmp_path):
    bad = (1, 2, 6)
    whole = run(_scaled_job(tmp_path / "whole", _Counting(None), bad))
    with pytest.raises(SystemError):
        run(_scaled_job(tmp_path / "parts", _Counting(10), bad))
    saved = torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)
    assert saved["scaler"]["scale"] == 65536 / 8
    resumed = run(_scaled_job(tmp_path / "parts", _Counting(None), bad))
    assert resumed.history == whole.history
    assert all(torch.equal(v, whole.weights[k]) for k, v in resumed.weights.items())
    assert [r["loss_scale"] for r in whole.history[:3]] == [65536, 65536 / 2, 65536 / 4]


def test_a_step_of_infinite_gradients_is_passed_over_in_float16(tmp_path):
    listener = _Counting(None)
    job = _scaled_job(tmp_path, listener, bad=(0,), steps=1)
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    after = run(job).weights
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    job = _scaled_job(tmp_path / "fine", _Counting(None), steps=1)
    assert not all(torch.equal(v, before[k]) for k, v in run(job).weights.items())


def test_gradients_are_clipped_unscaled(tmp_path):
    """SGD of one step moves the weights by the rate times the clipped norm, whatever the scale."""
    moved = {}
    for kind in ("32", "16-mixed"):
        job = _scaled_job(tmp_path / kind, _Counting(None), steps=1, precision=kind)
        job.optimizer = job.optimizer.model_copy(
            update={"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.01, "warmup_steps": 0, "lr": 1.0}
        )
        before = {k: v.clone() for k, v in job.model.state_dict().items()}
        after = run(job).weights
        moved[kind] = sum((after[k] - before[k]).square().sum() for k in before) ** 0.5
    assert float(moved["32"]) == pytest.approx(0.01, rel=0.02)
    # Clipped before they are unscaled they would move next to nothing.
    assert float(moved["16-mixed"]) == pytest.approx(0.01, rel=0.02)


def test_a_loss_that_is_not_finite_ends_a_training_in_float16_too(tmp_path):
    job = _scaled_job(tmp_path, _Counting(None))
    job.loss = lambda model, batch, device: {"a": model(batch).sum() * float("nan")}
    with pytest.raises(ModelError, match=r"step 1: the loss is nan; lower optimizer\.lr"):
        run(job)


@pytest.mark.parametrize("kind", ["32", "16-mixed"])
def test_gradients_that_are_never_finite_end_it_with_a_remedy(kind, tmp_path):
    job = _scaled_job(tmp_path, _Counting(None), bad=range(100), bad_value=float("nan"), precision=kind, steps=40)
    with pytest.raises(ModelError, match=r"the gradients are not finite.*lower optimizer\.lr"):
        run(job)


def test_a_checkpoint_without_a_scale_goes_on(tmp_path):
    """As 0.6.0 wrote them."""
    with pytest.raises(SystemError):
        run(_scaled_job(tmp_path, _Counting(10)))
    old = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del old["scaler"]
    torch.save(old, tmp_path / CHECKPOINT)
    assert len(run(_scaled_job(tmp_path, _Counting(None))).history) == 20


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("fpu amx_bf16 amx_tile avx512_bf16", "bf16-mixed"),
        ("fpu avx512_bf16 amx_int8", "bf16-mixed"),
        ("fpu avx512f amx_int8", "32"),
        ("", "32"),
        (None, "32"),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_it_multiplies_matrices_of_it(flags, kind, monkeypatch, tmp_path):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nvmx flags : amx_bf16\nflags\t\t: {flags}\nbugs : amx_bf16\n")
    monkeypatch.setattr(instructions, "CPU_INFO", tmp_path / "cpuinfo")
    instructions.cpu_flags.cache_clear()
    try:
        assert pick_precision("cpu", "auto") == kind
        assert pick_precision("cpu", "32") == "32"
    finally:
        instructions.cpu_flags.cache_clear()


def test_a_training_of_another_precision_is_another_training(airfield, monkeypatch, tmp_path):
    def plan(precision="auto"):
        overrides = ("training.precision=" + precision,)
        which = {"task": "unet", "recipe": "demo_unet", "register_as": "u", "overrides": overrides}
        request = TrainingRequest(data=str(airfield), work_dir=str(tmp_path), **which)
        return plan_training(request).key

    keys = []
    for flags in ({"amx_bf16"}, set()):
        monkeypatch.setattr(instructions, "cpu_flags", lambda known=flags: known)
        keys += [plan(), plan("32")]
    (with_amx, full), (without, same) = keys[:2], keys[2:]
    assert full == same
    assert len({with_amx, without, full}) == 3


def test_precision_of_each_device(monkeypatch):
    assert pick_precision("cpu", "bf16-mixed") == "bf16-mixed"
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    for capability, kind in {(7, 0): "16-mixed", (7, 5): "16-mixed", (8, 0): "bf16-mixed", (9, 0): "bf16-mixed"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
        assert pick_precision("cuda", "auto") == pick_precision("cuda:1", "auto") == kind
        assert pick_precision("cuda", "32") == "32"


def test_a_gpu_has_processes_that_prepare_its_batches(monkeypatch):
    for cores, count in ((None, 0), (2, 1), (16, 8), (64, 8)):
        monkeypatch.setattr("os.cpu_count", lambda known=cores: known)
        assert (pick_workers("cuda:1", None), pick_workers("cpu", None)) == (count, 0)
    assert [pick_workers(device, n) for device in ("cpu", "cuda") for n in (0, 3)] == [0, 3, 0, 3]


def test_devices_are_checked_by_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(d) for d in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(ModelError, match="there are 2 CUDA devices, counted from 0; use cuda:1"):
        pick_device("cuda:2")
    for odd in ("cuda:", "cuda:x", "cuda:-1", "cudas", "gpu"):
        with pytest.raises(ModelError, match="expected auto, cpu, cuda or cuda:N"):
            pick_device(odd)


def test_the_recipe_takes_a_precision():
    assert TrainingSettings().precision == "auto"
    assert load_recipe("demo_unet", ["training.precision=32"]).training.precision == "32"
    with pytest.raises(RecipeError, match=r"training\.precision.*found 16"):
        load_recipe("demo_unet", ["training.precision=16"])
    json.dumps(load_recipe("demo_unet").model_dump())


def test_only_the_loss_is_half(tmp_path):
    """Inputs and boxes stay as they are; torchvision refuses boxes in half precision."""
    seen = []
    job = _job(tmp_path, precision="bf16-mixed", steps=1)

    class Watching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            seen.append((x.dtype, self.inner(x).dtype))
            return self.inner(x)

    job.model = Watching(job.model)
    job.evaluate = lambda model: seen.append(torch.is_autocast_enabled("cpu")) or {"m": 1.0}
    run(job)
    assert seen == [(torch.float32, torch.bfloat16), False]


def test_losses_over_all_pixels_are_taken_in_full_precision():
    logits = torch.randn(2, 1, 64, 64).to(torch.bfloat16)
    batch = np.zeros((2, 64, 64, 3), np.uint8), (np.random.default_rng(0).random((2, 64, 64)) < 0.1).astype(np.float32)
    half, full = (segmenter_loss("bce_dice")(lambda x, out=out: out, batch, "cpu") for out in (logits, logits.float()))
    assert half == full
