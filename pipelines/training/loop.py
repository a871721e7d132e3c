"""The training loop: any torch model, batches as a function of the step, resumable to the bit on one machine."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import nn

from models.errors import ModelError, one_line
from pipelines.settings import OptimizerSettings, TrainingSettings

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"

Record = dict[str, Any]


class Batches(Protocol):
    """Training examples: ``batches[step]`` is a pure function of the step; ``len`` is an epoch."""

    def __getitem__(self, step: int) -> Any: ...

    def __len__(self) -> int: ...


class Listener(Protocol):
    """Told what happens; must not change the model."""

    def on_start(self, history: Sequence[Record], total: int) -> None:
        """Training begins or goes on after ``history``."""

    def on_step(self, record: Record) -> None:
        """A step is done."""

    def on_checkpoint(self, history: Sequence[Record]) -> None:
        """All of ``history`` is safe on disk."""


@dataclass
class Job:
    """What to train. ``evaluate`` returns metrics, of which ``metric`` is to be maximised."""

    model: nn.Module
    batches: Batches
    loss: Callable[[nn.Module, Any, torch.device], Mapping[str, torch.Tensor]]
    training: TrainingSettings
    optimizer: OptimizerSettings
    folder: Path
    device: str
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    metric: str = ""
    listeners: Sequence[Listener] = field(default_factory=tuple)


@dataclass
class Outcome:
    """Weights chosen, the step they are of, and every record of loss, learning rate and validation."""

    weights: dict[str, torch.Tensor]
    step: int
    best: float | None
    history: list[Record]


def total_steps(training: TrainingSettings, epoch: int) -> int:
    """Number of steps, given the batches of an epoch."""
    return training.epochs * epoch if training.epochs else training.steps


def learning_rate(settings: OptimizerSettings, step: int, total: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "steps":
        return settings.lr * settings.gamma ** sum(step >= m for m in settings.milestones)
    if settings.schedule == "cosine":
        share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
        return settings.lr * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
    return settings.lr


def run(job: Job) -> Outcome:
    """Train, or go on from the folder's checkpoint, until the last step.

    Every ``checkpoint_every`` steps and on Ctrl-C, which ends the step first, the state
    is written to ``folder/checkpoint.pt``, atomically. The weights returned are those of
    the best validation, or the last ones without validation.

    Raises:
        ModelError: the loss is not finite, or the checkpoint cannot be used.
    """
    cuda = job.device.startswith("cuda")
    precision = ("bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed") if cuda else "32-true"
    devices = [int(job.device.partition(":")[2] or 0)] if cuda else 1
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=devices, precision=precision)
    model, optimizer = fabric.setup(job.model, make_optimizer(job.model, job.optimizer))
    state = _restore(job, optimizer, fabric.device)
    epoch = len(job.batches)
    total = total_steps(job.training, epoch)
    for listener in job.listeners:
        listener.on_start(state["history"], total)
    loader = iter(step_loader(job.batches, state["step"], total, job.training.workers))
    interrupt = Interrupt()
    try:
        while state["step"] < total:
            interrupt.check()
            step = state["step"]
            record = _step(job, fabric, model, optimizer, next(loader), step, total)
            record["epoch"] = (step + 1) / epoch
            state["history"].append(record)
            state["step"] = step + 1
            if job.evaluate and _due(step + 1, job.training.evaluate_every or epoch, total):
                _evaluate(job, model, state, record)
            for listener in job.listeners:
                listener.on_step(record)
            if _due(step + 1, job.training.checkpoint_every or epoch, total):
                _save(job, optimizer, state)
        interrupt.check()
    except KeyboardInterrupt:
        _save(job, optimizer, state)
        raise
    finally:
        interrupt.restore()
    best = job.folder / BEST
    weights = torch.load(best, weights_only=True)["model"] if best.exists() and job.evaluate else job.model.state_dict()
    return Outcome(weights, state["best_step"] or total, state["best"], state["history"])


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters; biases and norms are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr)


def _step(
    job: Job, fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, step: int, total: int
) -> Record:
    model.train()
    # Samplers inside detectors draw from the global generator: a seed per step makes
    # a resumed run draw what an undisturbed one would have drawn.
    torch.manual_seed(job.training.seed * 1_000_003 + step)
    rate = learning_rate(job.optimizer, step, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses = job.loss(model, batch, fabric.device)
    loss = torch.stack(list(losses.values())).sum()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ModelError(f"step {step + 1}: the loss is {value}; lower optimizer.lr (now {rate:g}) or raise warmup_steps")
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    if job.optimizer.clip_norm:
        fabric.clip_gradients(model, optimizer, max_norm=job.optimizer.clip_norm)
    optimizer.step()
    parts = {f"train/{k}": float(v.detach()) for k, v in losses.items()} if len(losses) > 1 else {}
    return {"step": step + 1, "train/loss": value, **parts, "lr": rate}


def _due(done: int, every: int, total: int) -> bool:
    return done % every == 0 or done == total


def _evaluate(job: Job, model: nn.Module, state: dict[str, Any], record: Record) -> None:
    model.eval()
    metrics = job.evaluate(job.model) if job.evaluate else {}
    record |= {f"val/{k}": v for k, v in metrics.items()}
    value = metrics.get(job.metric, math.nan)
    if state["best"] is None or value > state["best"]:
        state["best"], state["best_step"] = value, record["step"]
        write_atomically({"model": job.model.state_dict()}, job.folder / BEST)


def _save(job: Job, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    content = {"model": job.model.state_dict(), "optimizer": optimizer.state_dict(), **state}
    content["history"] = json.dumps(state["history"])
    write_atomically(content, job.folder / CHECKPOINT)
    for listener in job.listeners:
        listener.on_checkpoint(state["history"])


def _restore(job: Job, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    path = job.folder / CHECKPOINT
    if not path.exists():
        return {"step": 0, "best": None, "best_step": None, "history": []}
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        job.model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except Exception as error:
        raise ModelError(f"{path}: cannot be resumed from ({one_line(error)[:200]}); train with --fresh") from None
    kept = {k: content[k] for k in ("step", "best", "best_step")}
    return {**kept, "history": json.loads(content["history"])}


def write_atomically(content: Any, path: Path) -> None:
    """torch.save to a temporary file, flushed to disk, then renamed over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as handle:
        torch.save(content, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


class Interrupt:
    """Holds Ctrl-C back until a step is whole: half a step saved could not be resumed to the bit.

    A second Ctrl-C stops at once. Outside the main thread, or where somebody else
    handles the signal, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        ours = threading.current_thread() is threading.main_thread()
        self._installed = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give the signal back."""
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Remaining(torch.utils.data.Dataset):
    def __init__(self, batches: Batches, start: int, total: int) -> None:
        self.batches, self.start, self.total = batches, start, total

    def __len__(self) -> int:
        return self.total - self.start

    def __getitem__(self, index: int) -> Any:
        return self.batches[self.start + index]


def step_loader(batches: Batches, start: int, total: int, workers: int) -> torch.utils.data.DataLoader:
    """The batches of steps ``start`` to ``total``, made by ``workers`` processes (0: by this one)."""
    remaining = _Remaining(batches, start, total)
    # A generator of its own: beginning to iterate draws a number, which would shift what the first step draws.
    own = torch.Generator()
    return torch.utils.data.DataLoader(
        remaining, batch_size=None, shuffle=False, num_workers=workers, collate_fn=_as_it_is, generator=own
    )


def _as_it_is(batch: Any) -> Any:
    return batch
