"""Weights of torch models: strict and matching loading, files that others trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models.errors import ModelError, one_line
from models.saved.safe_pickle import only_arrays, read_pickled_arrays

log = logging.getLogger(__name__)


def load_strict(model: nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Load exactly these weights.

    Raises:
        ModelError: a tensor is missing, too much, or of another shape.
    """
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise ModelError(f"{name}: weights do not fit the architecture ({one_line(error, 300)})") from error


def build_fitting(
    build: Callable[[], nn.Module],
    weights: Mapping[str, torch.Tensor],
    name: str,
    shapes: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Build a network and load exactly these weights, once its shapes alone are seen to fit them.

    A description that asks for more memory than its weights fill is refused before any of it
    is taken: the first build is on torch's ``meta`` device, which has none. ``shapes`` is
    that build where ``build`` itself cannot run there. No random numbers are drawn for weights
    that are replaced at once: the network of `detector_scratch` is built in a fifth of the time,
    the demo's U-Net in about half.

    Raises:
        ModelError: a tensor is missing, too much, or of another shape.
    """
    with torch.device("meta"), _Undrawn():
        trial = (shapes or build)()
        load_strict(trial, {k: torch.empty(v.shape, dtype=v.dtype) for k, v in weights.items()}, name)
    with _Undrawn():
        model = build()
    load_strict(model, weights, name)
    return model


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where modules fill them with random numbers; holds for its own thread."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


# Within a function of nn.init the mode is off.
DRAWS = {
    *(torch.Tensor.uniform_, torch.Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_),
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_),
}


def load_matching(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> int:
    """Load the tensors whose name and shape fit, and say which stay as they were drawn; return how many.

    Raises:
        ModelError: none fits.
    """
    own = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise ModelError(f"weights {source}: no tensor fits this architecture")
    model.load_state_dict(fitting, strict=False)
    left = [k for k in own if k not in fitting]
    if left:
        few = len(fitting) < len(left)
        log.log(
            logging.WARNING if few else logging.INFO,
            f"weights {source}: {'only ' * few}{len(fitting)} of {len(own)} tensors fit; drawn anew: "
            f"{', '.join(left[:3])}{' ...' * (len(left) > 3)}",
        )
    return len(left)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Tensors of a saved folder, a .safetensors, .pth or (arrays only) .pkl file; pickled code is never run.

    Raises:
        ModelError: missing, damaged, or not a table of tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir():
        path = path / "weights.safetensors"
    if not path.is_file():
        raise ModelError(f"weights {path}: no such file; give none, a torchvision weight name or a local path")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        if path.suffix == ".pkl":
            return _from_arrays(read_pickled_arrays(path), path)
        content = load_safely(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"weights {path}: cannot be read safely ({one_line(error, 200)})") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ModelError(f"weights {path}: not a table of tensors")
    return content


def load_safely(path: str | Path) -> Any:
    """Content of a torch file on the CPU; pickled code is never run.

    Raises:
        ModelError: damaged, or a pickle that calls anything.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"weights {path}: cannot be read safely ({one_line(error, 200)})") from error


def _from_arrays(content: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    table = content["model"] if isinstance(content.get("model"), dict) else content
    arrays = only_arrays(table)
    if not arrays:
        raise ModelError(f"weights {path}: not a table of arrays")
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def download_error(what: str, error: Exception) -> ModelError:
    """The error for pretrained weights that cannot be fetched."""
    return ModelError(
        f"weights of {what} cannot be downloaded ({one_line(error, 160)}); "
        "set weights to none, or to a local .pth or .safetensors file"
    )
