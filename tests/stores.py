"""Empty MLflow stores for tests: copies of one, which MLflow takes seconds to make."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sqlite3
import tempfile
from pathlib import Path


@functools.cache
def _template() -> tempfile.TemporaryDirectory:
    from mlflow.tracking import MlflowClient

    # Kept until this process ends.
    folder = tempfile.TemporaryDirectory()
    # Its first experiment's folder is made where it is made.
    with contextlib.chdir(folder.name):
        client = MlflowClient(f"sqlite:///{folder.name}/empty.db")
        client.search_experiments()
        client.search_registered_models()
    return folder


def new_store(path: Path, artefacts: str = "") -> str:
    """Write an empty store, whose first experiment keeps its artefacts in ``mlruns`` beside it; return its address."""
    shutil.copy(f"{_template().name}/empty.db", path)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ?", (artefacts or str(path.parent / "mlruns" / "0"),)
        )
    connection.close()
    return f"sqlite:///{path}"
