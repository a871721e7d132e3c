"""A saved folder becomes a predictor."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from models.errors import EngineMissing, ModelError, invalid_field
from models.predictor import Predictor
from models.saved.allowed_files import check_folder
from models.saved.folder import read_weights
from models.saved.spec import ModelSpec, read_spec
from models.tiling.predictor import by_tiles, network_of
from models.tiling.settings import Tiling

# (kind, engine) -> function that builds a predictor from (spec, weights, device), imported on use;
# those of compositions and twins take the folder instead of weights.
BUILDERS = {
    ("detector", "torchvision"): "models.engines.torchvision.predictor:load_detector",
    ("detector", "detectron2"): "models.engines.detectron2.predictor:load_detectron2",
    ("instance_segmenter", "torchvision"): "models.engines.torchvision.predictor:load_detector",
    ("instance_segmenter", "detectron2"): "models.engines.detectron2.predictor:load_detectron2",
    ("instance_segmenter", "composed"): "models.engines.composed:load_composed",
    ("detector", "openvino"): "models.engines.openvino.predictor:load_twin",
    ("instance_segmenter", "openvino"): "models.engines.openvino.predictor:load_twin",
    ("segmenter", "openvino"): "models.engines.openvino.predictor:load_twin",
    ("segmenter", "smp"): "models.engines.unet.predictor:load_segmenter",
    ("segmenter", "skipnet"): "models.engines.unet.predictor:load_segmenter",
}


def load_model(folder: str | Path, device: str = "cpu", tiling: Mapping[str, Any] | None = None) -> Predictor:
    """Load a saved folder with the installed code; nothing of the folder is executed.

    Args:
        tiling: settings of `Tiling` to take instead of the version's own; ``{"size": 0}``
            predicts whole images. A composition hands them to its detector.

    Raises:
        ModelError: not a saved model, files that do not belong there, an unknown kind, settings
            or weights that do not fit.
        EngineMissing: a library it needs is not installed.
    """
    from models.runtime.devices import pick_device

    check_folder(folder)
    spec = read_spec(folder)
    target = BUILDERS.get((spec.kind, spec.engine))
    if target is None:
        known = ", ".join("/".join(key) for key in BUILDERS)
        raise ModelError(f"{folder}: unknown model {spec.kind}/{spec.engine}; known: {known}")
    module, function = target.split(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise EngineMissing(
            f"{folder}: a {spec.engine} model needs {error.name}, which is not installed: install requirements.txt, "
            "or score a version that has a twin (planes-registry accelerate makes it)"
        ) from error
    # A composition has no weights of its own; its components are folders like this one.
    if spec.engine == "composed":
        return build(spec, Path(folder), device=device, tiling=tiling, load=load_model)
    used = retiled(spec, tiling or {})
    if spec.engine == "openvino":
        if device not in ("auto", "cpu"):
            raise ModelError(f"{folder}: a twin for CPUs; use --device cpu, or --runtime torch")
        return by_tiles(build(spec, Path(folder), used.size if used else None), used, "cpu")
    return by_tiles(build(spec, read_weights(folder), device), used, pick_device(device))


def load_retiled(predictor: Predictor, folder: str | Path, device: str, tiling: Mapping[str, Any]) -> Predictor:
    """What `load_model` with ``tiling`` gives, with the networks of ``predictor``, which was loaded from the same folder.

    A twin's network is converted for tiles of one size, and loaded anew.

    Raises:
        ModelError: settings that do not fit.
    """
    spec = read_spec(folder)
    if spec.engine == "openvino":
        return load_model(folder, device, tiling)
    if spec.engine == "composed":
        from models.engines.composed import DETECTOR, ComposedPredictor

        assert isinstance(predictor, ComposedPredictor), "loaded from another folder"
        detector = load_retiled(predictor.detector, Path(folder) / DETECTOR, device, tiling)
        return ComposedPredictor(detector, predictor.segmenter, predictor.architecture)
    return by_tiles(network_of(predictor), retiled(spec, tiling), device)


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
        raise ModelError(f"tiles: {invalid_field(error)}") from error
