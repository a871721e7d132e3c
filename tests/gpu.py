"""A GPU that is none: torch says that there is one, and what is moved there stays where it is.

The code that only a GPU walks runs so on any machine, in the GPU's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


class FakeGpu:
    """What was asked of the GPU: tensors moved there, tensors pinned."""

    def __init__(self) -> None:
        self.moved = self.pinned = 0


def _is_gpu(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _staying(move: Callable[..., Any], gpu: FakeGpu) -> Callable[..., Any]:
    """``move`` (a ``.to``) with "cpu" in place of a GPU."""

    def to(self: Any, *arguments: Any, **options: Any) -> Any:
        gpu.moved += any(map(_is_gpu, (*arguments, *options.values())))
        stays = [torch.device("cpu") if _is_gpu(a) else a for a in arguments]
        return move(self, *stays, **{k: torch.device("cpu") if _is_gpu(v) else v for k, v in options.items()})

    return to


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0)) -> FakeGpu:
    """Let torch believe in one GPU of this compute capability until the test ends."""
    gpu = FakeGpu()
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": capability,
        "get_device_name": "a GPU that is not there",
        "is_bf16_supported": True,
        "set_device": None,
        "empty_cache": None,
        "current_device": 0,
        "is_current_stream_capturing": False,
        "max_memory_allocated": 5_000_000,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, known=answer, **__: known)

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        gpu.pinned += 1
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", _staying(torch.Tensor.to, gpu))
    monkeypatch.setattr(torch.nn.Module, "to", _staying(torch.nn.Module.to, gpu))
    ones, autocast = torch.ones, torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, *rest, **more: autocast("cpu", *rest, **more))

    def ones_here(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return ones(*size, device="cpu" if _is_gpu(device) else device, **options)

    monkeypatch.setattr(torch, "ones", ones_here)
    return gpu
