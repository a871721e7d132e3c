"""Hooks of Detectron2's trainer: records for the listeners, validation, best weights, checkpoints, Ctrl-C."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from pipelines.training.checkpoints import keep_best, save_best
from pipelines.training.loop import Interrupt, Listener, Record, is_better
from pipelines.training.pictures import Pictures, show

Evaluate = Callable[[torch.nn.Module], dict[str, float]]


class Recorder(HookBase):
    """Seeds each iteration, records it, validates at the interval and keeps the best weights.

    Detectron2's EvalHook runs after the checkpoint is written: killed in between, a
    resumed training would lack that validation. Here it comes before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        listeners: Sequence[Listener],
        evaluate: Evaluate | None,
        pictures: Pictures | None,
        epoch: int,
        period: int,
        metric: str,
    ) -> None:
        self.folder, self.listeners, self.evaluate, self.pictures = folder, listeners, evaluate, pictures
        self.epoch, self.period, self.metric = epoch, period, metric
        self.history: list[Record] = []
        self.best: float | None = None
        self.best_step: int | None = None

    def before_train(self) -> None:
        """Report the history that an earlier process left."""
        for listener in self.listeners:
            listener.on_start(self.history, self.trainer.max_iter)

    def before_step(self) -> None:
        """A seed per iteration makes a resumed run sample what an undisturbed one would have sampled."""
        torch.manual_seed((max(self.trainer.cfg.SEED, 0) * 1_000_003 + self.trainer.iter) * 64 + comm.get_rank())

    def after_step(self) -> None:
        """Record the iteration."""
        done = self.trainer.iter + 1
        due = (self.period > 0 and done % self.period == 0) or done == self.trainer.max_iter
        if comm.is_main_process():
            self.history.append(self._record(done))
            if self.evaluate and due:
                self._validate(self.history[-1])
                show(self.listeners, self.pictures, done, every=max(0, self.period), total=self.trainer.max_iter)
            for listener in self.listeners:
                listener.on_step(self.history[-1])
        if due:
            comm.synchronize()

    def _record(self, done: int) -> Record:
        values = {k: float(v) for k, (v, at) in self.trainer.storage.latest().items() if at == self.trainer.iter}
        record: Record = {"step": done, "train/loss": values["total_loss"]}
        record |= {f"train/{k}": v for k, v in values.items() if k.startswith("loss")}
        record |= {"lr": values["lr"], "epoch": done / self.epoch}
        names = {"time": "seconds/iteration", "data_time": "seconds/data"}
        names |= {"[metric]grad_scaler": "loss_scale"}
        return record | {name: values[k] for k, name in names.items() if k in values}

    def _validate(self, record: Record) -> None:
        model = self.trainer.model
        metrics = self.evaluate(model) if self.evaluate else {}
        model.train()
        record |= {f"val/{k}": v for k, v in metrics.items()}
        value = metrics.get(self.metric, math.nan)
        if is_better(value, self.best):
            bare = model.module if hasattr(model, "module") else model
            save_best(bare.state_dict(), self.folder, record["step"])
            self.best, self.best_step = value, record["step"]

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint must hold, in plain values."""
        return {"history": json.dumps(self.history), "best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.history = json.loads(state["history"])
        self.best, self.best_step = state["best"], state["best_step"]


class Saved(HookBase):
    """After the checkpointer: notifies the listeners, and ends an interrupted training once its state is safe."""

    def __init__(self, recorder: Recorder, checkpointer: Any, *, period: int, interrupt: Interrupt | None) -> None:
        self.recorder, self.checkpointer, self.period, self.interrupt = recorder, checkpointer, period, interrupt

    def after_step(self) -> None:
        """Notify the listeners of a checkpoint; save one more where the training is to stop."""
        done = self.trainer.iter + 1
        stop = bool(self.interrupt and self.interrupt.requested)
        safe = done % self.period == 0 or done == self.trainer.max_iter
        if stop and not safe:
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        if safe or stop:
            keep_best(self.recorder.folder, self.recorder.best_step)
            for listener in self.recorder.listeners:
                listener.on_checkpoint(self.recorder.history)
        if stop:
            raise KeyboardInterrupt


def make_hooks(
    trainer: Any,
    folder: Path,
    *,
    listeners: Sequence[Listener],
    evaluate: Evaluate | None,
    pictures: Pictures | None,
    epoch: int,
    interrupt: Interrupt | None,
) -> tuple[list[HookBase], Recorder]:
    """Detectron2's timer, scheduler and checkpointer with ours between them, and the recorder among them."""
    cfg = trainer.cfg
    period = cfg.SOLVER.CHECKPOINT_PERIOD
    metric = "mask_AP" if cfg.MODEL.MASK_ON else "AP"
    recorder = Recorder(
        folder,
        listeners=listeners,
        evaluate=evaluate,
        pictures=pictures,
        epoch=epoch,
        period=cfg.TEST.EVAL_PERIOD,
        metric=metric,
    )
    made = [hooks.IterationTimer(), hooks.LRScheduler(), recorder]
    if comm.is_main_process():
        made.append(hooks.PeriodicCheckpointer(trainer.checkpointer, period, max_to_keep=2))
        made.append(Saved(recorder, trainer.checkpointer, period=period, interrupt=interrupt))
    return made, recorder
