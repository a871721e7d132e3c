"""The Predictor protocol and the saved form of a model: a folder of model.json and weights.safetensors."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import ModelError, one_line
from models.instances import Instances
from models.rendering import Rendering
from models.saved_files import MAX_BYTES, SPEC_FILE, WEIGHTS_FILE, check_folder
from models.tiling import Tiling, by_tiles

A = TypeVar("A", bound=BaseModel)

FORMAT = 1

# (kind, engine) -> function that builds a predictor from (spec, weights, device), imported on use;
# that of a composition takes the folder instead of weights.
BUILDERS = {
    ("detector", "torchvision"): "models.torchvision_engine:load_detector",
    ("detector", "detectron2"): "models.detectron2_engine:load_detectron2",
    ("instance_segmenter", "torchvision"): "models.torchvision_engine:load_detector",
    ("instance_segmenter", "detectron2"): "models.detectron2_engine:load_detectron2",
    ("instance_segmenter", "composed"): "models.composed:load_composed",
    ("segmenter", "smp"): "models.unet:load_segmenter",
    ("segmenter", "skipnet"): "models.unet:load_segmenter",
}


@runtime_checkable
class Predictor(Protocol):
    """Anything that finds planes; no base class and no registration needed."""

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """One Instances per RGB uint8 (H, W, 3) image, in order, with ``image_id`` "0", "1", ..."""
        ...


class ModelSpec(BaseModel):
    """Content of model.json. Unknown keys are errors; ``architecture`` is checked by its engine.

    ``tiling``: images are predicted by such tiles; null for whole images. ``rendering``: how image
    files become the RGB uint8 arrays that the model was trained on.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    kind: str = Field(max_length=64)
    engine: str = Field(max_length=64)
    architecture: dict[str, Any]
    classes: list[Annotated[str, Field(max_length=200)]] = Field(min_length=1, max_length=10_000)
    versions: dict[str, str] = Field(default_factory=dict, max_length=100)
    tiling: Tiling | None = None
    rendering: Rendering = Rendering()


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
    folder = Path(folder)
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
        raise ModelError(f"{folder}: cannot save the model ({one_line(error)})") from None
    return folder


def folder_digest(folder: Path) -> str:
    """sha256 over names and contents of a saved model's files, 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def read_spec(folder: str | Path) -> ModelSpec:
    """Read and validate model.json.

    Raises:
        ModelError: missing, not JSON, of an unknown format, or with wrong fields.
    """
    path = Path(folder) / SPEC_FILE
    try:
        if path.stat().st_size > MAX_BYTES[SPEC_FILE]:
            raise ModelError(f"{path}: larger than {MAX_BYTES[SPEC_FILE]:,} bytes, not a model description")
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a saved model (no {SPEC_FILE})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({one_line(error)})") from None
    if isinstance(content, dict) and content.get("format") not in (None, FORMAT):
        raise ModelError(f"{path}: format {content['format']!r}, this release reads {FORMAT}; install the matching release")
    try:
        return ModelSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(v) for v in first["loc"]) or "whole file"
        raise ModelError(f"{path}: {where}: {first['msg']}") from None


def parse_architecture(spec: ModelSpec, kind: type[A]) -> A:
    """The spec's architecture as its engine's settings.

    Raises:
        ModelError: a field that is unknown or out of range, by name.
    """
    try:
        return kind.model_validate(spec.architecture)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{SPEC_FILE}: architecture.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def load_model(folder: str | Path, device: str = "cpu", tiling: Mapping[str, Any] | None = None) -> Predictor:
    """Load a saved folder with the installed code; nothing of the folder is executed.

    Args:
        tiling: settings of `Tiling` to take instead of the version's own; ``{"size": 0}``
            predicts whole images. A composition hands them to its detector.

    Raises:
        ModelError: not a saved model, files that do not belong there, an unknown kind, settings
            or weights that do not fit.
        EngineMissing: the detection library it needs is not installed.
    """
    from models.torch_tools import pick_device

    check_folder(folder)
    spec = read_spec(folder)
    target = BUILDERS.get((spec.kind, spec.engine))
    if target is None:
        known = ", ".join("/".join(key) for key in BUILDERS)
        raise ModelError(f"{folder}: unknown model {spec.kind}/{spec.engine}; known: {known}")
    module, function = target.split(":")
    build = getattr(importlib.import_module(module), function)
    # A composition has no weights of its own; its parts are folders like this one.
    if spec.engine == "composed":
        return build(spec, Path(folder), device, tiling)
    used = retiled(spec, tiling or {})
    return by_tiles(build(spec, read_weights(folder), device), used, pick_device(device))


def retiled(spec: ModelSpec, changes: Mapping[str, Any]) -> Tiling | None:
    """The version's tiling with ``changes``; None for whole images.

    Raises:
        ModelError: a setting that is unknown or out of range, or tiles for a model that
            segments crops or does without them.
    """
    if not changes or changes.get("size") == 0:
        return None if changes else spec.tiling
    if spec.tiling is None and set(changes) == {"batch"}:
        return None
    if spec.kind == "segmenter":
        raise ModelError("tiles: this model segments planes in given boxes; tiles are for models that find planes")
    if spec.tiling is None and "size" not in changes:
        raise ModelError("tiles: this model predicts whole images; give the size of a tile too (--tile 512)")
    known = spec.tiling.model_dump() if spec.tiling else {}
    try:
        return Tiling.model_validate({**known, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"tiles: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


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
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a saved model (no {WEIGHTS_FILE})") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: damaged weights ({one_line(error)})") from None
