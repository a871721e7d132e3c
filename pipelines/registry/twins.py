"""Twins of registered versions: OpenVINO networks that were measured beside their parent, named by tags of it.

A twin is a logged model of its own, with a digest. Its parent version is not changed but for the
tag ``twin_f32``, ``twin_bf16`` or ``twin_int8`` that names it, and works as before without it.
"""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from mlflow import MlflowException
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from pydantic import Field, ValidationError

from models.engines.openvino.network import supports
from models.errors import RegistryError, one_line
from models.runtime.devices import TwinPrecision
from models.twins import check_twin
from pipelines.registry.approvals import Approved, approved_of
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.registry.registration import logged_name
from pipelines.tracking.mlflow_runs import store_errors

log = logging.getLogger(__name__)

TAG = "twin_"
PRECISIONS: tuple[TwinPrecision, ...] = ("f32", "bf16", "int8")
# Milliseconds after which a twin that no version names was left by an `accelerate` that was killed: naming takes seconds.
LEFT_BEHIND = 24 * 3600 * 1000


class Twin(Approved):
    """What a version's tag says of one of its twins, which passed its gates."""

    prefix: ClassVar[str] = TAG

    precision: TwinPrecision
    model_id: str = Field(pattern=r"^m-\w{1,64}$", description="MLflow's id of the logged model.")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of its saved folder.")

    def __str__(self) -> str:
        return f"openvino {self.precision}, {self.speedup:.2f} times as fast when measured (run {self.run_id})"


def twins_of(record: ModelVersion) -> list[Twin]:
    """A version's twins, the fastest first.

    Raises:
        RegistryError: a tag that names none.
    """
    return approved_of(record, Twin, PRECISIONS, "")


def usable(twin: Twin) -> str | None:
    """Why a twin cannot be used on this machine, if so."""
    if find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install openvino)"
    if not supports(twin.precision):
        return f"this CPU does not compute in {twin.precision}"
    return None


def fetch_twin(registry: Registry, version: Resolved, parent: Path, twin: Twin) -> Path:
    """Local saved folder of a version's twin, checked against its digest and against the version's folder.

    Raises:
        RegistryError: its files are gone, or not those that were measured.
        ModelError: it is of another model.
    """
    try:
        folder = registry.fetch_logged(twin.model_id, twin.digest, f"{version.label}, {twin.tag}")
    except RegistryError as error:
        remedy = f"planes-registry accelerate {version.label} makes it anew, --runtime torch does without"
        raise RegistryError(f"{one_line(error)}; {remedy}") from error
    check_twin(parent, folder)
    return folder


def name_twin(registry: Registry, version: Resolved, twin: Twin) -> None:
    """Tag a version with its twin; one of the same precision gives way, and is deleted where no other version names it.

    Raises:
        RegistryError: the store refuses.
    """
    earlier = registry.version_of(version).tags.get(twin.tag)
    with store_errors(f"{version.label}: cannot be tagged"):
        registry.client.set_model_version_tag(str(version.name), str(version.version), twin.tag, twin.model_dump_json())
    if earlier is not None and twin.model_id not in earlier:
        delete_unnamed(registry, twin.tag, earlier)


def forget_twin(registry: Registry, version: Resolved, precision: TwinPrecision) -> None:
    """Remove the tag of a twin that does not pass its gates any more, and the twin where no other version names it.

    Raises:
        RegistryError: the store refuses.
    """
    earlier = registry.version_of(version).tags.get(TAG + precision)
    if earlier is not None:
        with store_errors(f"{version.label}: its tag cannot be removed"):
            registry.client.delete_model_version_tag(str(version.name), str(version.version), TAG + precision)
        delete_unnamed(registry, TAG + precision, earlier)


def delete_unnamed(registry: Registry, tag: str, text: str) -> None:
    """Delete the logged model that a tag's text named, unless a version names it still; artefacts stay until ``mlflow gc``.

    Copies within a registry name the same one. Where this user may not delete, or the text names none, nothing is done.
    """
    try:
        twin = Twin.model_validate_json(text)
        if not registry.search_versions(f"tags.{tag} = '{text}'"):
            registry.client.delete_logged_model(twin.model_id)
    except ValidationError:
        return
    except (MlflowException, RegistryError) as error:
        log.warning(f"{tag}: {twin.model_id}, which no version names any more, is not deleted ({one_line(error, 160)})")


def unnamed_twins(registry: Registry, name: str) -> list[LoggedModel]:
    """Twins that were made of versions of a model at least a day ago and that no version names.

    An ``accelerate`` that was killed between logging and naming leaves one, and two at once may.

    Raises:
        RegistryError: the store refuses.
    """
    client, latest = registry.client, time.time() * 1000 - LEFT_BEHIND
    found: list[LoggedModel] = []
    with store_errors(f"{name}: its twins cannot be listed"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for precision in PRECISIONS:
            condition, token = f"name = '{logged_name(f'{name}-{precision}')}'", None
            while True:
                page = client.search_logged_models(experiments, condition, page_token=token)
                found += [m for m in page if m.creation_timestamp <= latest and _made_of(registry, m, name)]
                token = page.token
                if not token:
                    break
        return [m for m in found if not any(registry.search_versions(_names(p, m.model_id)) for p in PRECISIONS)]


def delete_left(registry: Registry, model: LoggedModel) -> None:
    """Delete one of `unnamed_twins`; its artefacts stay until ``mlflow gc``.

    Raises:
        RegistryError: the store refuses.
    """
    with store_errors(f"{model.name} {model.model_id}: cannot be deleted"):
        registry.client.delete_logged_model(model.model_id)


def _names(precision: TwinPrecision, model_id: str) -> str:
    return f"tags.{TAG}{precision} LIKE '%\"{model_id}\"%'"


def _made_of(registry: Registry, model: LoggedModel, name: str) -> bool:
    """Whether a run of ``accelerate`` logged it: a registered model may be called as a twin is."""
    try:
        tags = registry.client.get_run(str(model.source_run_id)).data.tags
    except MlflowException:
        return False
    return tags.get("task") == "accelerate" and tags.get("version", "").rpartition("/")[0] == name
