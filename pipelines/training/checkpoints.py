"""Files of an unfinished training: written whole or not at all, and those of the best step kept beside its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.errors import ModelError, OutputError, one_line
from pipelines.files import write_whole

# Written by 0.6.0 under this name, whatever the step.
OLD_BEST = "best.pt"


def write_atomically(content: Any, path: Path) -> None:
    """torch.save to a temporary file of its own, flushed to disk, then renamed over ``path``.

    Raises:
        OutputError: it cannot be written; what was there before stays.
    """
    try:
        write_whole(path, lambda handle: torch.save(content, handle))
    except (OSError, RuntimeError) as error:
        # torch's own writer turns a full disk into a RuntimeError.
        raise OutputError(f"{path}: cannot be written ({one_line(error, 160)}); is the disk full?") from error


def best_path(folder: Path, step: int) -> Path:
    """Where the weights of the best validation, after ``step`` steps, are kept."""
    return folder / f"best-{step}.pt"


def save_best(weights: dict[str, torch.Tensor], folder: Path, step: int) -> None:
    """Keep these weights beside those of earlier steps: the checkpoint still names one of those."""
    write_atomically({"model": weights}, best_path(folder, step))


def keep_best(folder: Path, step: int | None) -> None:
    """Remove the weights of all other steps, once a checkpoint names this one."""
    if step is not None and best_path(folder, step).exists():
        for path in (*folder.glob("best-*.pt"), folder / OLD_BEST):
            if path != best_path(folder, step):
                path.unlink(missing_ok=True)


def read_best(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights kept for the best step, on the CPU.

    Raises:
        ModelError: they are not there or damaged.
    """
    path = best_path(folder, step)
    path = path if path.exists() else folder / OLD_BEST
    try:
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)["model"]
    except Exception as error:
        what = f"the weights of its best step {step} cannot be read ({one_line(error, 160)})"
        raise ModelError(f"{path}: {what}; train with --fresh") from error
    return weights
