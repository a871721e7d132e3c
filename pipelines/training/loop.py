"""The training loop: any torch model, batches as a function of the step, resumable to the bit on one machine.

Processes of a group (`pipelines.training.group`) run it side by side, each with its share of every batch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import nn

from models.errors import ModelError, PlanesError, one_line
from models.runtime.devices import Precision, pick_precision, precision
from pipelines.recipes.settings import OptimizerSettings, TrainingSettings
from pipelines.training.checkpoints import keep_best, read_best, save_best, write_atomically
from pipelines.training.group import ALONE, Batches, Group, own_share
from pipelines.training.pictures import Pictures, show

CHECKPOINT = "checkpoint.pt"

Record = dict[str, Any]


class Listener(Protocol):
    """Is notified of what happens; must not change the model.

    One that has an ``on_interrupt`` is notified of Ctrl-C (`Interrupt`), one that has an ``on_pictures`` gets pictures of
    validations (`pipelines.training.pictures`).
    """

    def on_start(self, history: Sequence[Record], total: int) -> None:
        """Training begins or goes on after ``history``."""

    def on_step(self, record: Record) -> None:
        """A step is done."""

    def on_checkpoint(self, history: Sequence[Record]) -> None:
        """All of ``history`` is safe on disk."""


class Stopped(PlanesError):
    """Raised by a listener that has seen enough of a training."""


@dataclass
class Job:
    """A training: model, batches, settings. ``evaluate`` returns metrics, of which ``metric`` is to be maximised.

    ``pictures`` gives those of the last validation.
    In a ``group`` of several processes ``batches`` are `SharedBatches`, ``loss`` gives
    this process's parts of the losses of the whole batch, which add up to these, and process 0 alone has listeners.
    """

    model: nn.Module
    batches: Batches
    _: KW_ONLY
    loss: Callable[[nn.Module, Any, torch.device], Mapping[str, torch.Tensor]]
    training: TrainingSettings
    optimizer: OptimizerSettings
    folder: Path
    device: str
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    metric: str = ""
    pictures: Pictures | None = None
    listeners: Sequence[Listener] = field(default_factory=tuple)
    group: Group = ALONE


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


@dataclass
class _Machine:
    """State of a training step: network on its device, optimiser, precision, and the scaler of float16's gradients."""

    fabric: Fabric
    model: nn.Module
    optimizer: torch.optim.Optimizer
    kind: Precision
    scaler: torch.amp.GradScaler
    average: MovingAverage | None


class MovingAverage:
    """Exponential moving average of a network's floating weights and statistics.

    At step t the past counts ``min(decay, (1 + t) / (10 + t))``, so that the first steps are soon forgotten
    (as TensorFlow's ExponentialMovingAverage does it).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in _floating(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after ``step`` (0-based) in."""
        past = min(self.decay, (1 + step) / (10 + step))
        for name, value in _floating(model).items():
            self.values[name].lerp_(value, 1 - past)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the network's weights."""
        for name, value in _floating(model).items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)


def _floating(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def run(job: Job) -> Outcome:
    """Train, or go on from the folder's checkpoint, until the last step.

    Every ``checkpoint_every`` steps and on Ctrl-C, which ends the step first, the state
    is written to ``folder/checkpoint.pt``, atomically. Whatever else stops a step halfway,
    a second Ctrl-C too, leaves the checkpoint before it. The weights returned are those of
    the best validation, or the last ones without validation.

    Of several processes the first one validates and writes; it alone has the outcome's weights and validations.

    Raises:
        ModelError: the loss or its gradients are not finite, or the checkpoint cannot be used.
        OutputError: the disk is full.
    """
    machine, group = _set_up(job), job.group
    state = _restore(job, machine)
    average = machine.average
    epoch = len(job.batches)
    total = total_steps(job.training, epoch)
    for listener in job.listeners:
        listener.on_start(state["history"], total)
    workers = pick_workers(job.device, job.training.workers, group.world)
    loader = iter(step_loader(own_share(job.batches, group), state["step"], total, workers))
    interrupt = Interrupt(job.listeners, group)
    # Whether weights, optimiser, history and best step are all of one step.
    whole = True
    try:
        while state["step"] < total:
            interrupt.check()
            batch, whole = next(loader), False
            step = state["step"]
            record = _step(job, machine, batch, step, total)
            record["epoch"] = (step + 1) / epoch
            if average is not None:
                average.update(job.model, step)
            every = job.training.evaluate_every or epoch
            if group.rank == 0 and job.evaluate and _due(step + 1, every, total):
                _evaluate(job, machine, state, record)
                show(job.listeners, job.pictures, step + 1, every=every, total=total)
            state["history"].append(record)
            state["step"], whole = step + 1, True
            for listener in job.listeners:
                listener.on_step(record)
            if _due(step + 1, job.training.checkpoint_every or epoch, total):
                _save(job, machine, state)
        interrupt.check()
    except KeyboardInterrupt:
        if whole and not interrupt.at_once:
            _save(job, machine, state)
        raise
    finally:
        interrupt.restore()
    return _outcome(job, machine, state, total)


def _outcome(job: Job, machine: _Machine, state: dict[str, Any], total: int) -> Outcome:
    if job.group.rank > 0:
        return Outcome({}, total, None, state["history"])
    best = state["best_step"] if job.evaluate else None
    if machine.average is not None:
        machine.average.swap(job.model)
    weights = job.model.state_dict() if best is None else read_best(job.folder, best)
    return Outcome(weights, best or total, state["best"], state["history"])


def _set_up(job: Job) -> _Machine:
    """The job on its device.

    Fabric moves the network and takes the gradients, in full precision: its own mixed precision
    would turn all that is handed to the network into half precision, target boxes too, which
    torchvision's detectors refuse and which would round coordinates. Mixed precision is
    torch's autocast around the loss instead, with a scaler for float16 alone.
    """
    cuda = job.device != "cpu"
    devices = [int(job.device.partition(":")[2] or 0)] if cuda else 1
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=devices, precision="32-true")
    joined = job.group.joined(job.model, fabric.device)
    model, optimizer = fabric.setup(joined, make_optimizer(job.model, job.optimizer))
    kind = pick_precision(job.device, job.training.precision)
    scaler = torch.amp.GradScaler(fabric.device.type, enabled=kind == "16-mixed")
    # The weights are the same in all processes; the first one keeps their average.
    average = MovingAverage(job.model, job.training.ema) if job.training.ema and job.group.rank == 0 else None
    return _Machine(fabric, model, optimizer, kind, scaler, average)


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


def _step(job: Job, machine: _Machine, batch: Any, step: int, total: int) -> Record:
    model, optimizer, scaler = machine.model, machine.optimizer, machine.scaler
    model.train()
    # Samplers inside detectors draw from the global generator: a seed per step makes
    # a resumed run draw what an undisturbed one would have drawn.
    torch.manual_seed(job.training.seed * 1_000_003 + step)
    rate = learning_rate(job.optimizer, step, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with precision(job.device, machine.kind):
        losses = job.loss(model, batch, machine.fabric.device)
    loss = torch.stack([term.float() for term in losses.values()]).sum()
    value, terms = _values(job.group, losses, loss)
    remedy = f"lower optimizer.lr (now {rate:g}) or raise warmup_steps"
    if not math.isfinite(value):
        raise ModelError(f"step {step + 1}: the loss is {value}; {remedy}")
    optimizer.zero_grad(set_to_none=True)
    machine.fabric.backward(scaler.scale(loss))
    if job.optimizer.clip_norm:
        scaler.unscale_(optimizer)
        norm = machine.fabric.clip_gradients(model, optimizer, max_norm=job.optimizer.clip_norm, error_if_nonfinite=False)
        if not scaler.is_enabled() and norm is not None and not math.isfinite(norm):
            raise ModelError(f"step {step + 1}: the gradients are not finite, the loss is {value:g}; {remedy}")
    # The scaler passes over a step whose gradients are not finite, and scales the next ones less.
    scaler.step(optimizer)
    scaler.update()
    record = {"step": step + 1, "train/loss": value, "lr": rate}
    record |= {f"train/{k}": v for k, v in terms.items()} if len(terms) > 1 else {}
    if scaler.is_enabled():
        record["loss_scale"] = scaler.get_scale()
        if record["loss_scale"] < 1:
            raise ModelError(f"step {step + 1}: the gradients are not finite, unscaled too; {remedy}")
    return record


def _values(group: Group, losses: Mapping[str, torch.Tensor], loss: torch.Tensor) -> tuple[float, dict[str, float]]:
    """The loss of the whole batch and its terms."""
    if group.world == 1:
        return float(loss.detach()), {k: float(v.detach()) for k, v in losses.items()}
    terms = group.total(torch.stack([v.detach().double().cpu() for v in losses.values()])).tolist()
    return sum(terms), dict(zip(losses, terms, strict=True))


def _due(done: int, every: int, total: int) -> bool:
    return done % every == 0 or done == total


def is_better(value: float, best: float | None) -> bool:
    """Whether a validation beats the best one so far; a value that could not be measured is beaten by any."""
    return best is None or math.isnan(best) or value > best


def _evaluate(job: Job, machine: _Machine, state: dict[str, Any], record: Record) -> None:
    if machine.average is not None:
        machine.average.swap(job.model)
    # In full precision: so the version will be measured too.
    machine.model.eval()
    metrics = job.evaluate(job.model) if job.evaluate else {}
    record |= {f"val/{k}": v for k, v in metrics.items()}
    value = metrics.get(job.metric, math.nan)
    if is_better(value, state["best"]):
        save_best(job.model.state_dict(), job.folder, record["step"])
        state["best"], state["best_step"] = value, record["step"]
    if machine.average is not None:
        machine.average.swap(job.model)


def _save(job: Job, machine: _Machine, state: dict[str, Any]) -> None:
    if job.group.rank > 0:
        return
    content = {"model": job.model.state_dict(), "optimizer": machine.optimizer.state_dict(), **state}
    content |= {"scaler": machine.scaler.state_dict(), "history": json.dumps(state["history"])}
    if machine.average is not None:
        content["average"] = machine.average.values
    write_atomically(content, job.folder / CHECKPOINT)
    keep_best(job.folder, state["best_step"])
    for listener in job.listeners:
        listener.on_checkpoint(state["history"])


def _restore(job: Job, machine: _Machine) -> dict[str, Any]:
    path = job.folder / CHECKPOINT
    if not path.exists():
        return {"step": 0, "best": None, "best_step": None, "history": []}
    try:
        # Read on the CPU: the optimiser moves what belongs on the device, and counts its steps on the CPU.
        content = torch.load(path, map_location="cpu", weights_only=True)
        job.model.load_state_dict(content["model"])
        machine.optimizer.load_state_dict(content["optimizer"])
        # Without one: written by 0.6.0, or in another precision.
        if machine.scaler.is_enabled() and content.get("scaler"):
            machine.scaler.load_state_dict(content["scaler"])
        if machine.average is not None:
            machine.average.values = {k: v.to(machine.fabric.device) for k, v in content["average"].items()}
        state = {**{k: content[k] for k in ("step", "best", "best_step")}, "history": json.loads(content["history"])}
    except Exception as error:
        raise ModelError(f"{path}: cannot be resumed from ({one_line(error, 200)}); train with --fresh") from error
    if state["best_step"] is not None:
        read_best(job.folder, state["best_step"])
    return state


class Interrupt:
    """Holds Ctrl-C back until a step is whole: half a step saved could not be resumed to the bit.

    A second Ctrl-C stops at once (``at_once``), and nothing may be saved then. ``listeners``
    that have an ``on_interrupt`` are notified of the first one. Outside the main thread, or
    where somebody else handles the signal, nothing is changed. Processes of a ``group`` check together, and all of
    them stop where one is to.
    """

    def __init__(self, listeners: Sequence[Listener] = (), group: Group = ALONE) -> None:
        self.requested = self.at_once = False
        self._group = group
        self._callbacks = [listener.on_interrupt for listener in listeners if hasattr(listener, "on_interrupt")]
        ours = threading.current_thread() is threading.main_thread()
        self._installed = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.requested:
            self.at_once = True
            raise KeyboardInterrupt
        self.requested = True
        for notify in self._callbacks:
            notify()

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self._group.agrees(self.requested):
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


def pick_workers(device: str, requested: int | None, world: int = 1) -> int:
    """Number of processes that prepare batches for each of ``world`` that train: the requested one, or one that suits.

    A GPU waits for its batches where one process makes them; on a CPU the network takes all cores itself.
    """
    if requested is not None:
        return requested
    return 0 if device == "cpu" else min(8, (os.cpu_count() or 1) // 2 // world)


def step_loader(batches: Batches, start: int, total: int, workers: int) -> torch.utils.data.DataLoader:
    """The batches of steps ``start`` to ``total``, made by ``workers`` processes (0: by this one)."""
    remaining = _Remaining(batches, start, total)
    # A generator of its own: beginning to iterate draws a number, which would shift what the first step draws.
    own = torch.Generator()
    more: dict[str, Any] = {"collate_fn": _as_it_is, "generator": own, "worker_init_fn": _ignore_ctrl_c}
    return torch.utils.data.DataLoader(remaining, batch_size=None, shuffle=False, num_workers=workers, **more)


def _ignore_ctrl_c(worker: int) -> None:
    # A terminal sends it to these processes too; the step it is held back for still needs its batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
