"""The instance table of a scoring run: in the store, or left where it was written because it was too large for one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mlflow.tracking import MlflowClient

from models.errors import RegistryError
from pipelines.tracking.mlflow_runs import store_errors
from scoring.jobs.shards import INSTANCES

# Of a run's artefacts: what was left, where, and the digest of the table.
LEFT = "left_in_place.json"


def fetch_table(client: MlflowClient, run_id: str) -> Path:
    """The instance table of a scoring run, from the store or, where it was too large for it, from where it was left.

    Raises:
        RegistryError: it is in neither place any more.
    """
    with store_errors(f"run {run_id}: its instance table cannot be fetched", OSError):
        if not any(a.path == f"scoring/{LEFT}" for a in client.list_artifacts(run_id, "scoring")):
            return Path(client.download_artifacts(run_id, f"scoring/{INSTANCES}"))
        content = json.loads(Path(client.download_artifacts(run_id, f"scoring/{LEFT}")).read_text())
        if INSTANCES not in content["left"]:
            return Path(client.download_artifacts(run_id, f"scoring/{INSTANCES}"))
    path = Path(content["folder"]) / INSTANCES
    try:
        with open(path, "rb") as handle:
            equal = hashlib.file_digest(handle, "sha256").hexdigest() == content["left"][INSTANCES]["sha256"]
    except OSError:
        equal = False
    if not equal:
        raise RegistryError(f"run {run_id}: its table was too large to be logged, and {path} is gone or another one now")
    return path
