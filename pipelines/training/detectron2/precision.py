"""Detectron2's steps in mixed precision, on any device: bfloat16 where the device computes in it, else float16."""

from __future__ import annotations

import time
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import get_event_storage

from models.runtime.devices import Precision, pick_precision, precision


def amp_precision(device: str) -> Precision:
    """The precision that ``SOLVER.AMP.ENABLED`` means on a device: bfloat16 on a CPU, on a GPU the one that suits it."""
    return "bf16-mixed" if device == "cpu" else pick_precision(device, "auto")


def make_stepper(model: torch.nn.Module, inputs: Any, optimizer: torch.optim.Optimizer, *, device: str, mixed: bool) -> Any:
    """Detectron2's trainer of single steps, in mixed precision if requested."""
    if not mixed:
        return SimpleTrainer(model, inputs, optimizer)
    return MixedTrainer(model, inputs, optimizer, device, amp_precision(device))


class MixedTrainer(AMPTrainer):
    """As Detectron2's AMPTrainer, which asks for CUDA and is bound to it.

    Losses of one step are summed in full precision; the scaler works for float16 alone.
    """

    def __init__(
        self, model: torch.nn.Module, inputs: Any, optimizer: torch.optim.Optimizer, device: str, kind: Precision
    ) -> None:
        self.device, self.kind = device, kind
        scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=kind == "16-mixed")
        super().__init__(model, inputs, optimizer, grad_scaler=scaler)

    def run_step(self) -> None:
        """One step; one whose gradients are not finite in float16 changes nothing but the scale.

        Raises:
            FloatingPointError: the loss, or the gradients unscaled, are not finite.
        """
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with precision(self.device, self.kind):
            losses = {k: v.float() for k, v in self.model(data).items()}
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled():
            scale = self.grad_scaler.get_scale()
            get_event_storage().put_scalar("[metric]grad_scaler", scale)
            if scale < 1:
                raise FloatingPointError(f"Gradients are not finite at iteration={self.iter}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint; one of another precision has no scale to go on with."""
        SimpleTrainer.load_state_dict(self, state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
