"""The model registry: log and register a saved folder, resolve what a user names, fetch it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

import cv2
import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

import models
from models.errors import RegistryError, one_line
from models.predictor import SPEC_FILE, folder_digest

PACKAGE = Path(models.__file__).parent

# Tag of a version: digest of its saved folder.
DIGEST = "digest"

# What a version needs to run by itself; the rest of the project is not in it.
SERVING_REQUIREMENTS = (
    "mlflow",
    "numpy",
    "opencv-python",
    "pandas",
    "pillow",
    "pycocotools",
    "pydantic",
    "safetensors",
    "segmentation-models-pytorch",
    "timm",
    "torch",
    "torchvision",
)

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
)


@dataclass(frozen=True)
class Resolved:
    """A registered version or a saved folder, and how it was named.

    ``name`` and ``version`` are None for a folder, ``folder`` is None for a version;
    ``digest`` is that of the version's saved folder, as its tag says.
    """

    asked: str
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    model_id: str | None = None
    folder: Path | None = None
    digest: str | None = None

    @property
    def label(self) -> str:
        """Short name for tables: ``planes-det/3`` or the folder's name."""
        return f"{self.name}/{self.version}" if self.name else (self.folder.name if self.folder else self.asked)


def log_and_register(
    folder: Path, name: str, example: np.ndarray, tags: Mapping[str, str], run_id: str, register: bool = True
) -> tuple[ModelVersion | None, str]:
    """Log a saved folder to the active run as a models-from-code pyfunc and, with ``register``, register it.

    Args:
        example: RGB uint8 image, logged (base64 PNG) as the input example.
        tags: tags of the version.

    Returns:
        The version (None where it is not registered) and MLflow's id of the logged model. Where the run has already
        registered one (a process that was killed just after), that one.

    Raises:
        RegistryError: the store refuses.
    """
    client = MlflowClient()
    try:
        for version in client.search_model_versions(f"run_id = '{run_id}'"):
            if version.name == name:
                return version, str(logged_model_id(version))
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(PACKAGE / "pyfunc.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(PACKAGE)],
            signature=SIGNATURE,
            input_example=_example_table(example),
            pip_requirements=[f"{p}=={installed(p)}" for p in SERVING_REQUIREMENTS],
        )
        version = mlflow.register_model(info.model_uri, name, tags=dict(tags)) if register else None
    except mlflow.MlflowException as error:
        raise RegistryError(f"{name}: cannot be registered ({one_line(error)[:300]})") from None
    return version, str(info.model_id)


def _example_table(image: np.ndarray):  # type: ignore[no-untyped-def]
    import pandas as pd

    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return pd.DataFrame({"image": [base64.b64encode(encoded.tobytes()).decode("ascii")]})


def resolve(text: str) -> Resolved:
    """Find what ``text`` names.

    A saved folder; ``name/3`` (version), ``name/Production`` (alias, else stage, in any
    case), ``name/latest``, ``name@alias``, each with or without ``models:/`` before it.

    Raises:
        RegistryError: nothing of that name (listing what exists), or two aliases that
            differ only in case.
    """
    if (Path(text) / SPEC_FILE).is_file():
        return Resolved(text, folder=Path(text))
    plain = re.sub(r"^models:/+", "", text)
    name, sign, what = plain.partition("@") if "@" in plain else plain.partition("/")
    if not sign or not name or not what or "/" in what:
        raise RegistryError(
            f"model {text!r}: expected a saved folder, NAME/VERSION, NAME/ALIAS or NAME@ALIAS; {_known_models()}"
        )
    versions = _versions(name)
    if not versions:
        raise RegistryError(f"model {text!r}: no registered model {name!r}; {_known_models()}")
    found = _pick(name, what, sign == "@", versions)
    if found is None:
        raise RegistryError(f"model {text!r}: {name} has no version, alias or stage {what!r}; {describe(name, versions)}")
    digest = found.tags.get(DIGEST)
    return Resolved(text, name, str(found.version), found.run_id, logged_model_id(found), digest=digest)


def logged_model_id(version: ModelVersion) -> str | None:
    """MLflow's id of the logged model behind a version; SQL stores tell it by the version's source only."""
    match = re.search(r"^models:/(m-\w+)$", version.source or "")
    return version.model_id or (match[1] if match else None)


def _pick(name: str, what: str, alias_only: bool, versions: Sequence[ModelVersion]) -> ModelVersion | None:
    by_number = {str(v.version): v for v in versions}
    if not alias_only and re.fullmatch(r"v?\d+", what):
        return by_number.get(what.removeprefix("v"))
    number = find_alias(name, what)
    if number is not None:
        return by_number.get(number)
    if alias_only:
        return None
    if what.lower() == "latest":
        return max(versions, key=lambda v: int(v.version))
    # Stages are deprecated in MLflow; a server that still has them is heard last.
    staged = [v for v in versions if (v.current_stage or "None").lower() == what.lower() != "none"]
    return max(staged, key=lambda v: int(v.version), default=None)


def find_alias(name: str, alias: str) -> str | None:
    """The version number that an alias, in any case, points to; None where there is none.

    Raises:
        RegistryError: two aliases differ only in case and point to different versions.
    """
    same = {k: str(v) for k, v in aliases_of(name).items() if k.lower() == alias.lower()}
    if len(set(same.values())) > 1:
        listed = ", ".join(f"{k} -> {v}" for k, v in sorted(same.items()))
        raise RegistryError(f"{name}: aliases that differ only in case ({listed}); delete all but the lower-case one")
    return next(iter(same.values()), None)


def aliases_of(name: str) -> dict[str, str]:
    """Alias -> version number of a registered model."""
    try:
        return {k: str(v) for k, v in MlflowClient().get_registered_model(name).aliases.items()}
    except mlflow.MlflowException as error:
        raise RegistryError(f"{name}: cannot be read from the registry ({one_line(error)[:200]})") from None


def set_alias(name: str, alias: str, version: str) -> None:
    """Point an alias, in lower case, to a version; other spellings of it are removed afterwards."""
    client = MlflowClient()
    written = alias.lower()
    client.set_registered_model_alias(name, written, version)
    for other in aliases_of(name):
        if other.lower() == written and other != written:
            client.delete_registered_model_alias(name, other)


def find_trained(name: str, key: str) -> ModelVersion | None:
    """The newest version that was trained with this key (recipe, data, code), if any."""
    matching = [v for v in _versions(name) if v.tags.get("training_key") == key and v.status == "READY"]
    return max(matching, key=lambda v: int(v.version), default=None)


def describe(name: str, versions: Sequence[ModelVersion] | None = None) -> str:
    """What exists under a name: ``versions 1-3; aliases production -> 2``."""
    versions = _versions(name) if versions is None else versions
    numbers = sorted(int(v.version) for v in versions)
    listed = ", ".join(map(str, numbers)) if len(numbers) < 8 else f"{numbers[0]} to {numbers[-1]}"
    aliases = ", ".join(f"{k} -> {v}" for k, v in sorted(aliases_of(name).items())) or "none"
    return f"versions: {listed}; aliases: {aliases}"


def _versions(name: str) -> list[ModelVersion]:
    quoted = name.replace("'", "")
    try:
        return list(MlflowClient().search_model_versions(f"name = '{quoted}'", max_results=1000))
    except mlflow.MlflowException as error:
        raise RegistryError(f"{name}: cannot be read from the registry ({one_line(error)[:200]})") from None


def _known_models() -> str:
    try:
        names = sorted(m.name for m in MlflowClient().search_registered_models(max_results=100))
    except mlflow.MlflowException:
        names = []
    return f"registered: {', '.join(names)}" if names else "nothing is registered here yet; train a model first"


def cache_folder() -> Path:
    """Where downloaded versions are kept: ``PLANES_CACHE``, or ``planes/versions`` in the user's cache folder."""
    given = os.environ.get("PLANES_CACHE")
    return (
        Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planes" / "versions"
    )


def fetch(resolved: Resolved) -> Path:
    """Local saved folder of what was resolved; where the artefacts are elsewhere, downloaded once and kept by digest.

    Raises:
        RegistryError: the artefacts are gone, hold no saved model of ours, or are not what
            the version's digest says.
    """
    if resolved.folder is not None:
        return resolved.folder
    uri = f"models:/{resolved.name}/{resolved.version}"
    kept = cache_folder() / resolved.digest if resolved.digest else None
    if kept is not None and _is_whole(kept):
        return kept
    try:
        source = MlflowClient().get_model_version_download_uri(str(resolved.name), str(resolved.version))
        if Path(source.removeprefix("file://")).is_dir():
            return _checked(Path(mlflow.artifacts.download_artifacts(artifact_uri=uri)), uri, resolved.digest)
        if kept is None:
            return _checked(Path(mlflow.artifacts.download_artifacts(artifact_uri=uri)), uri, None)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".download-") as into:
            got = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=into))
            saved = _checked(got, uri, resolved.digest)
            # Another process may have been faster, and be reading it.
            if not _is_whole(kept):
                shutil.rmtree(kept, ignore_errors=True)
                saved.rename(kept)
    except (mlflow.MlflowException, OSError) as error:
        raise RegistryError(f"{uri}: its artefacts cannot be fetched ({one_line(error)[:200]})") from None
    return kept


def _is_whole(kept: Path) -> bool:
    return (kept / SPEC_FILE).is_file() and folder_digest(kept) == kept.name


def _checked(local: Path, uri: str, digest: str | None) -> Path:
    specs = list(local.glob(f"artifacts/*/{SPEC_FILE}"))
    if len(specs) != 1:
        raise RegistryError(f"{uri}: not a version made by this project (no artifacts/*/{SPEC_FILE})")
    if digest is not None and folder_digest(specs[0].parent) != digest:
        raise RegistryError(f"{uri}: its files are not those that were registered (digest {digest}); do not use it")
    return specs[0].parent
