"""The loop: learns, resumes to the bit after a stop, keeps the best, notices a loss that explodes."""

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import ModelError
from pipelines.recipes.settings import OptimizerSettings, TrainingSettings
from pipelines.training.loop import CHECKPOINT, Job, learning_rate, run


class _Batches:
    def __len__(self):
        return 5

    def __getitem__(self, step):
        x = np.random.default_rng(step).standard_normal((16, 3)).astype(np.float32)
        return torch.from_numpy(x)


def _loss(model, batch, device):
    # Dropout-like noise from the global generator, as detectors' samplers use it.
    noise = torch.rand(())
    return {"a": (model(batch.to(device))[:, 0] - batch.sum(1)).square().mean() + 0 * noise, "b": noise * 0.01}


class _Stop:
    def __init__(self, at):
        self.at, self.checkpoints = at, []

    def on_start(self, history, total):
        self.started = len(history)

    def on_step(self, record):
        if record["step"] == self.at:
            raise SystemError("killed")

    def on_checkpoint(self, history):
        self.checkpoints.append(len(history))


def _job(folder, stop=None, evaluate=None, lr=0.05, **training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    settings = TrainingSettings(**{"steps": 20, "checkpoint_every": 4, **training})
    optimizer = OptimizerSettings(name="adamw", lr=lr, warmup_steps=3, clip_norm=1)
    return Job(
        model,
        _Batches(),
        loss=_loss,
        training=settings,
        optimizer=optimizer,
        folder=folder,
        device="cpu",
        evaluate=evaluate,
        metric="m",
        listeners=[stop] if stop else [],
    )


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = run(_job(tmp_path / "whole"))
    with pytest.raises(SystemError):
        run(_job(tmp_path / "cut", _Stop(at=10)))
    listener = _Stop(at=None)
    resumed = run(_job(tmp_path / "cut", listener))
    assert listener.started == 8
    assert all(torch.equal(v, whole.weights[k]) for k, v in resumed.weights.items())
    assert resumed.history == whole.history
    assert [r["step"] for r in whole.history] == list(range(1, 21))


def test_ctrl_c_keeps_the_last_step(tmp_path):
    class Interrupt(_Stop):
        def on_step(self, record):
            if record["step"] == self.at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(_job(tmp_path, Interrupt(at=7)))
    listener = _Stop(at=None)
    run(_job(tmp_path, listener))
    assert listener.started == 7


def test_the_best_validation_is_kept(tmp_path):
    values = iter([0.2, 0.9, 0.1, 0.3])
    outcome = run(_job(tmp_path, evaluate=lambda model: {"m": next(values)}, evaluate_every=5))
    assert (outcome.best, outcome.step) == (0.9, 10)
    assert [r["val/m"] for r in outcome.history if "val/m" in r] == [0.2, 0.9, 0.1, 0.3]


def test_epochs_decide_where_given(tmp_path):
    assert len(run(_job(tmp_path, epochs=2, steps=3)).history) == 10


def test_it_learns(tmp_path):
    history = run(_job(tmp_path, steps=200)).history
    assert history[-1]["train/a"] < 0.3 * history[0]["train/a"]


def test_an_exploding_loss_says_what_to_do(tmp_path):
    job = _job(tmp_path)
    job.loss = lambda model, batch, device: {"a": model(batch).sum() * float("inf")}
    with pytest.raises(ModelError, match=r"step 1: the loss is .*lower optimizer\.lr"):
        run(job)


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(ModelError, match="train with --fresh"):
        run(_job(tmp_path))


def test_learning_rates():
    settings = OptimizerSettings(lr=1.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(settings, s, 100) for s in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(rates) == 1.0
    assert 0.02 <= rates[-1] < 0.03
    steps = OptimizerSettings(lr=1.0, warmup_steps=0, schedule="steps", milestones=[10, 20], gamma=0.1)
    assert [round(learning_rate(steps, s, 30), 4) for s in (9, 10, 20)] == [1.0, 0.1, 0.01]
    assert learning_rate(OptimizerSettings(lr=1.0, schedule="constant", warmup_steps=0), 99, 100) == 1.0


class _Weights(_Stop):
    """Keeps the network's weights after each step, and their average as it should be."""

    def __init__(self, job, decay):
        super().__init__(at=None)
        self.job, self.decay, self.averages = job, decay, []
        self.average = {k: v.clone() for k, v in job.model.state_dict().items()}
        self.weights = []
        job.listeners = [self]

    def on_step(self, record):
        self.weights.append({k: v.clone() for k, v in self.job.model.state_dict().items()})
        past = min(self.decay, record["step"] / (9 + record["step"]))
        self.average = {k: past * self.average[k] + (1 - past) * v for k, v in self.weights[-1].items()}
        self.averages.append(self.average)


def _close(first, second):
    return all(torch.allclose(v, second[k], atol=1e-6) for k, v in first.items())


def test_the_moving_average_is_that_of_the_weights_and_resumes_to_the_bit(tmp_path):
    job = _job(tmp_path / "whole", ema=0.8)
    seen = _Weights(job, 0.8)
    whole = run(job)
    assert _close(seen.averages[-1], whole.weights)
    assert not _close(seen.weights[-1], whole.weights)
    # The average changes nothing of the training itself.
    assert whole.history == run(_job(tmp_path / "without")).history
    with pytest.raises(SystemError):
        run(_job(tmp_path / "cut", _Stop(at=10), ema=0.8))
    resumed = run(_job(tmp_path / "cut", _Stop(at=None), ema=0.8))
    assert all(torch.equal(v, whole.weights[k]) for k, v in resumed.weights.items())


def test_what_is_validated_and_kept_is_the_average(tmp_path):
    validated = []

    def evaluate(model):
        validated.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"m": float(len(validated) == 2)}

    job = _job(tmp_path, evaluate=evaluate, evaluate_every=5, ema=0.8)
    seen = _Weights(job, 0.8)
    outcome = run(job)
    assert outcome.step == 10
    assert all(torch.equal(v, outcome.weights[k]) for k, v in validated[1].items())
    assert _close(seen.averages[9], validated[1])
    assert not _close(seen.weights[9], validated[1])
