"""Device, precision and memory layout of torch models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from models.errors import ModelError
from models.runtime.instructions import multiplies_bfloat16

if TYPE_CHECKING:
    import torch
    from torch import nn


def pick_device(device: str) -> str:
    """Turn ``auto`` into ``cuda`` or ``cpu`` and check that a named device exists; without torch there is the CPU alone.

    Raises:
        ModelError: unknown or absent device.
    """
    if device == "cpu" or (device == "auto" and find_spec("torch") is None):
        return "cpu"
    if find_spec("torch") is None:
        raise ModelError(f"device {device!r}: PyTorch is not installed, there is the CPU alone; use --device cpu or auto")
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise ModelError(f"device {device!r}: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: no CUDA device here; use --device cpu or auto")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise ModelError(f"device {device!r}: there are {count} CUDA devices, counted from 0; use cuda:{count - 1} or auto")
    return device


Precision = Literal["32", "bf16-mixed", "16-mixed"]
HalfPrecisionKind = Literal["bf16-mixed", "16-mixed"]
# Of a network that was converted to another runtime.
TwinPrecision = Literal["f32", "bf16", "int8"]


def pick_precision(device: str, requested: Literal["auto", "32", "bf16-mixed", "16-mixed"]) -> Precision:
    """Pick the precision to train in on a device of `pick_device`: the requested one, or one that suits the device.

    ``auto`` is bfloat16 on a CPU that multiplies it by itself and full precision on any other; on a GPU it is bfloat16
    where that computes in it, else float16. Measured on two cores, full precision over bfloat16, a training step of
    ``detector_scratch``: 1.9 with AMX, 1.75 (0.66 and 0.38 s) on an AMD EPYC with AVX-512 BF16.
    """
    if requested != "auto":
        return requested
    if device == "cpu":
        return "bf16-mixed" if multiplies_bfloat16() else "32"
    return "bf16-mixed" if computes_in(device, "bf16-mixed") else "16-mixed"


def computes_in(device: str, kind: Precision) -> bool:
    """Whether a GPU computes in a precision by itself; another one is emulated, slower than full precision."""
    if kind == "32":
        return True
    import torch

    # torch.cuda.is_bf16_supported() says yes where bfloat16 is emulated too (T4, V100).
    least = 8 if kind == "bf16-mixed" else 7
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= least


def gpu_name(device: str) -> str:
    """What the maker calls a GPU."""
    import torch

    return str(torch.cuda.get_device_name(device))


@contextmanager
def precision(device: str, kind: Precision) -> Iterator[None]:
    """Run networks inside with full or, where torch holds it safe, half precision (its autocast)."""
    if kind == "32":
        yield
        return
    import torch

    dtype = torch.bfloat16 if kind == "bf16-mixed" else torch.float16
    with torch.autocast(device.partition(":")[0], dtype):
        yield


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on a device; to a GPU through pinned memory, so that the copy runs beside other work."""
    return tensor.to(device) if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def channels_last(model: nn.Module) -> nn.Module:
    """The same network with its weights laid out channels last.

    Measured on 2 CPU cores: a training step of a ResNet-18 U-Net took 0.84 s this way
    and 1.36 s the other, one of a small Faster R-CNN 0.48 and 0.53 s.
    """
    import torch

    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def set_threads(number: int) -> None:
    """Let the networks of this process, whatever runs them, take so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(number)
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(number)


def library_versions() -> dict[str, str]:
    """Versions of the libraries on which the meaning of the weights depends."""
    return {name: version(name) for name in ("torch", "torchvision", "segmentation-models-pytorch", "timm")}
