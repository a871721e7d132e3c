"""The saved form of a model: a folder of model.json and weights.safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.errors import ModelError, one_line
from models.saved.allowed_files import SPEC_FILE, WEIGHTS_FILE
from models.saved.spec import ModelSpec


def save_model(folder: str | Path, spec: ModelSpec, weights: Mapping[str, Any]) -> Path:
    """Write ``folder`` with model.json and weights.safetensors, whole or not at all.

    An existing folder of the same name is replaced. ``weights`` is a torch state dict.

    Raises:
        ModelError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    return write_folder(folder, spec, lambda into: save_file(tensors, str(into / WEIGHTS_FILE)))


def write_folder(folder: str | Path, spec: ModelSpec, fill: Callable[[Path], None]) -> Path:
    """Write ``folder`` with model.json and what ``fill`` puts into it, whole or not at all.

    Raises:
        ModelError: the folder cannot be written.
    """
    folder, temporary = Path(folder), None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        temporary.chmod(0o755)
        fill(temporary)
        (temporary / SPEC_FILE).write_text(json.dumps(spec.model_dump(), indent=2) + "\n")
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    except OSError as error:
        raise ModelError(f"{folder}: cannot save the model ({one_line(error)})") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def rewrite_spec(folder: Path, spec: ModelSpec) -> None:
    """Put another model.json into a saved folder, whole or not at all.

    Raises:
        ModelError: it cannot be written.
    """
    path = folder / SPEC_FILE
    temporary = path.with_suffix(".part")
    try:
        temporary.write_text(json.dumps(spec.model_dump(), indent=2) + "\n")
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        # A file that does not belong there would make the folder unreadable.
        temporary.unlink(missing_ok=True)
        raise ModelError(f"{path}: cannot be written ({one_line(error)})") from error


def folder_digest(folder: Path) -> str:
    """sha256 over names and contents of a saved model's files, 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def read_weights(folder: str | Path) -> dict[str, Any]:
    """Tensors of weights.safetensors on the CPU.

    Raises:
        ModelError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_FILE
    try:
        return load_file(str(path))
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: not a saved model (no {WEIGHTS_FILE})") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: damaged weights ({one_line(error)})") from error
