"""A version copied into another registered model (`dev.planes-det` to `prod.planes-det`), here or on another server."""

from __future__ import annotations

import logging

from models.errors import RegistryError
from pipelines.registry.lineage import read_training_images
from pipelines.registry.model_versions import DIGEST, Registry, Resolved
from pipelines.registry.registration import check_name, log_and_register
from pipelines.registry.twins import fetch_twin, twins_of, usable
from pipelines.registry.verification import read_example
from pipelines.tracking import mlflow_runs
from pipelines.tracking.mlflow_runs import store_errors

log = logging.getLogger(__name__)

# What a copy does not inherit: it was neither promoted nor judged where it comes to.
LEFT = ("promoted_to_", "last_gates_run", "training_key")


def copy_version(registry: Registry, version: Resolved, name: str, to: Registry | None = None) -> Resolved:
    """Copy a version to a registered model ``name``; an equal copy that is there already is taken.

    Within one registry MLflow's ``copy_model_version`` points to the same files; into another one
    (``to``) they are checked, uploaded and registered anew.

    Raises:
        RegistryError: the copy is of itself, or a store refuses.
    """
    check_name(name)
    record = registry.version_of(version)
    if to is None and name == version.name:
        raise RegistryError(f"{version.label}: is a version of {name} already; give another name")
    tags = {k: v for k, v in record.tags.items() if not k.startswith(LEFT)} | {"copied_from": version.label}
    if to is not None:
        return _into(to, registry, version, name=name, tags=tags)
    known = _copy_of(registry, name, tags)
    if known is not None:
        return known
    client = registry.client
    with store_errors(f"{version.label}: cannot be copied to {name}"):
        with mlflow_runs.addressed(client):
            made = client.copy_model_version(f"models:/{version.label}", name)
        client.set_model_version_tag(name, made.version, "copied_from", version.label)
        for key in record.tags:
            if key.startswith(LEFT):
                client.delete_model_version_tag(name, made.version, key)
    return registry.resolve(f"{name}/{made.version}")


def _copy_of(registry: Registry, name: str, tags: dict[str, str]) -> Resolved | None:
    if name not in registry.registered_names():
        return None
    for record in registry.versions_of(name):
        same = all(record.tags.get(key) == tags.get(key) for key in (DIGEST, "copied_from"))
        if same and DIGEST in tags:
            return registry.resolve(f"{name}/{record.version}")
    return None


def _into(to: Registry, registry: Registry, version: Resolved, *, name: str, tags: dict[str, str]) -> Resolved:
    folder, example = registry.fetch(version), read_example(registry, version)
    if example is None:
        raise RegistryError(f"{version.label}: has no example (registered before 0.6); copy it within its registry instead")
    trained_on = read_training_images(registry, version)
    known = _copy_of(to, name, tags)
    if known is not None:
        return known
    named = twins_of(registry.version_of(version))
    tags = {k: v for k, v in tags.items() if k not in {twin.tag for twin in named}}
    twins = {}
    for twin in named:
        missing = usable(twin)
        if missing is None:
            twins[twin] = fetch_twin(registry, version, folder, twin)
        else:
            log.warning(f"{version.label}: its twin {twin.precision} is not copied ({missing})")
    what = {"task": "copy", "copied_from": version.label}
    with mlflow_runs.tracked_run(to.client, f"copy {version.label}", what) as run:
        for twin, place in twins.items():
            title = f"{name}-{twin.precision}"
            _, model_id = log_and_register(
                to, place, title, example=example.decoded(), tags={}, run_id=run.info.run_id, register=False
            )
            tags[twin.tag] = twin.model_copy(update={"model_id": model_id}).model_dump_json()
        made, _ = log_and_register(
            to, folder, name, example=example.decoded(), tags=tags, run_id=run.info.run_id, trained_on=trained_on
        )
    assert made is not None
    log.info(f"MLflow UI: {mlflow_runs.ui_link(to.client, run.info.run_id)}")
    return to.resolve(f"{name}/{made.version}")
