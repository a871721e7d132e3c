"""A version copied into another registered model (`dev.planes-det` to `prod.planes-det`), here or on another server."""

from __future__ import annotations

import mlflow
from mlflow.tracking import MlflowClient

from models.errors import RegistryError
from pipelines.registry import model_versions
from pipelines.registry.lineage import read_training_images
from pipelines.registry.model_versions import Resolved
from pipelines.registry.registration import log_and_register
from pipelines.registry.verification import read_example
from pipelines.tracking import mlflow_runs
from pipelines.tracking.mlflow_runs import store_errors

# What a copy does not inherit: it was neither promoted nor judged where it comes to.
LEFT = ("promoted_to_", "last_gates_run", "training_key")


def copy_version(version: Resolved, name: str, server: str | None = None) -> Resolved:
    """Copy a version to a registered model ``name``; an equal copy that is there already is taken.

    In one registry MLflow's ``copy_model_version`` points to the same files; on another
    server (``server``: its tracking URI) they are checked, uploaded and registered anew.

    Raises:
        RegistryError: the copy is of itself, or a store refuses.
    """
    record = model_versions.version_of(version)
    if server is None and name == version.name:
        raise RegistryError(f"{version.label}: is a version of {name} already; give another name")
    tags = {k: v for k, v in record.tags.items() if not k.startswith(LEFT)} | {"copied_from": version.label}
    if server is not None:
        return _to_server(version, name, server, tags)
    known = _copy_of(name, tags)
    if known is not None:
        return known
    client = MlflowClient()
    with store_errors(f"{version.label}: cannot be copied to {name}"):
        made = client.copy_model_version(f"models:/{version.label}", name)
        client.set_model_version_tag(name, made.version, "copied_from", version.label)
        for key in record.tags:
            if key.startswith(LEFT):
                client.delete_model_version_tag(name, made.version, key)
    return model_versions.resolve(f"{name}/{made.version}")


def _copy_of(name: str, tags: dict[str, str]) -> Resolved | None:
    if name not in model_versions.registered_names():
        return None
    for record in model_versions.versions_of(name):
        same = all(record.tags.get(key) == tags.get(key) for key in (model_versions.DIGEST, "copied_from"))
        if same and model_versions.DIGEST in tags:
            return model_versions.resolve(f"{name}/{record.version}")
    return None


def _to_server(version: Resolved, name: str, server: str, tags: dict[str, str]) -> Resolved:
    folder, example = model_versions.fetch(version), read_example(version)
    if example is None:
        raise RegistryError(f"{version.label}: has no example (registered before 0.6); copy it within its registry instead")
    trained_on = read_training_images(version)
    here = mlflow.get_tracking_uri()
    try:
        mlflow_runs.connect(server)
        known = _copy_of(name, tags)
        if known is not None:
            return known
        with mlflow_runs.tracked_run(f"copy {version.label}", {"task": "copy", "copied_from": version.label}) as run:
            made, _ = log_and_register(folder, name, example.decoded(), tags, run.info.run_id, trained_on=trained_on)
        assert made is not None
        return model_versions.resolve(f"{name}/{made.version}")
    finally:
        mlflow.set_tracking_uri(here)
