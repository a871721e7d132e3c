"""From a saved folder to a registered version that any MLflow tool can load, with an example and its output."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

import models
from models.errors import RegistryError
from models.instances import to_rows
from models.loading import load_model
from models.saved.folder import folder_digest
from models.twins import is_twin
from pipelines.registry.model_versions import DIGEST, JOURNAL, Registry
from pipelines.registry.training_images import TRAINING_IMAGES_FILE, TrainingImages
from pipelines.tracking.mlflow_runs import store_errors

PACKAGE = Path(models.__file__).parent

# Artefact of a version: the example image (PNG, base64) and the rows that the model predicts for it.
EXAMPLE_FILE = "example.json"

# What a version needs to run by itself; the rest of the project is not in it.
SERVED = (
    "mlflow",
    "numpy",
    "opencv-python",
    "pandas",
    "pillow",
    "pycocotools",
    "pydantic",
    "rasterio",
    "safetensors",
)
TORCH = ("segmentation-models-pytorch", "timm", "torch", "torchvision")

# All of them are the module cv2, and one of them is installed.
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "image_id"),
            ColSpec(DataType.long, "instance"),
            *[ColSpec(DataType.double, name) for name in ("x1", "y1", "x2", "y2", "score")],
            *[ColSpec(DataType.long, name) for name in ("label", "height", "width")],
            ColSpec(Array(DataType.long), "mask_size", required=False),
            ColSpec(DataType.string, "mask_counts", required=False),
        ]
    ),
    # None is what the version does by itself (`models.pyfunc.Params`).
    params=ParamSchema([ParamSpec("score_threshold", DataType.double, None), ParamSpec("tile", DataType.long, None)]),
)


def logged_name(name: str) -> str:
    """What the logged model of a registered one is called: its name knows fewer characters.

    >>> logged_name("dev.planes-det")
    'dev-planes-det'
    """
    return re.sub(r"[/:.%\"']", "-", name)


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a model, before anything is done for it.

    Raises:
        RegistryError: the journal's name, or one that MLflow does not take.
    """
    if name == JOURNAL:
        raise RegistryError(f"{name}: is the journal of promotions; give the model another name")
    if not name.strip() or name in (".", "..") or set(name) & set("/:"):
        raise RegistryError(f"{name!r}: cannot be the name of a model: it is empty, a folder's, or has / or : in it")


def log_and_register(
    registry: Registry,
    folder: Path,
    name: str,
    *,
    example: np.ndarray,
    tags: Mapping[str, str],
    run_id: str,
    register: bool = True,
    trained_on: TrainingImages | None = None,
) -> tuple[ModelVersion | None, str]:
    """Log a saved folder to the active run, which is one of this registry's, and with ``register`` register it.

    It is logged as a models-from-code pyfunc.

    Args:
        example: RGB uint8 image, logged (base64 PNG) as the input example, with what the model predicts for it.
        tags: tags of the version, beside that of its digest.
        trained_on: what is known of the images that decided its weights; None where nothing is.

    Returns:
        The version (None where it is not registered) and MLflow's id of the logged model. Where the run has already
        registered one (a process that was killed just after), that one.

    Raises:
        RegistryError: the store refuses.
    """
    check_name(name)
    with store_errors(f"{name}: cannot be registered", OSError):
        for known in registry.search_versions(f"run_id = '{run_id}'"):
            if known.name == name:
                return known, str(registry.logged_model_id(known))
        with tempfile.TemporaryDirectory() as work:
            shown = Path(work) / EXAMPLE_FILE
            shown.write_text(json.dumps(_answered(example, folder)))
            artifacts = {"model": str(folder), "example": str(shown)}
            if trained_on is not None:
                listed = Path(work) / TRAINING_IMAGES_FILE
                listed.write_text(trained_on.model_dump_json())
                artifacts["training_images"] = str(listed)
            info = mlflow.pyfunc.log_model(
                name=logged_name(name),
                python_model=str(PACKAGE / "pyfunc.py"),
                artifacts=artifacts,
                code_paths=[str(PACKAGE)],
                signature=SIGNATURE,
                input_example=pd.DataFrame({"image": [_encoded(example)]}),
                pip_requirements=[_requirement(p) for p in _required(folder)],
            )
        tags = {DIGEST: folder_digest(folder), **tags}
        version = mlflow.register_model(info.model_uri, name, tags=tags) if register else None
    return version, str(info.model_id)


def _required(folder: Path) -> tuple[str, ...]:
    """Packages that a saved folder needs to be served; a twin needs OpenVINO in place of torch."""
    return (*SERVED, "openvino") if is_twin(folder) else (*SERVED, *TORCH)


def _requirement(package: str) -> str:
    """``package==version`` as installed here; OpenCV under whichever of its four names it is; else the bare name."""
    for name in OPENCV if package in OPENCV else (package,):
        with suppress(PackageNotFoundError):
            return f"{name}=={installed(name)}"
    return package


def _encoded(image: np.ndarray) -> str:
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return base64.b64encode(encoded.tobytes()).decode("ascii")


def _answered(image: np.ndarray, folder: Path) -> dict[str, Any]:
    """The example and the rows that the saved model predicts for it on the CPU, where every machine can repeat it."""
    predicted = load_model(folder, "cpu").predict([image])[0].named("0")
    return {"image": _encoded(image), "rows": to_rows([predicted])}
