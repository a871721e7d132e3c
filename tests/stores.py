"""Empty MLflow stores for tests: copies of one, which MLflow takes seconds to make."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sqlite3
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    import s3fs

    from pipelines.registry.model_versions import Registry

# A folder of all processes of this run, where the empty store is made once.
shared: Path | None = None


@functools.cache
def _template() -> Path:
    from mlflow.tracking import MlflowClient

    assert shared
    folder = shared / "empty-store"
    folder.mkdir(exist_ok=True)
    store = folder / "empty.db"
    # Its first experiment's folder is made where it is made.
    with FileLock(folder / "lock"), contextlib.chdir(folder):
        if not store.exists():
            client = MlflowClient(f"sqlite:///{folder}/making.db")
            client.search_experiments()
            client.search_registered_models()
            shutil.copy(folder / "making.db", store)
    return store


def new_store(path: Path, artefacts: str = "") -> str:
    """Write an empty store, whose first experiment keeps its artefacts in ``mlruns`` beside it; return its address."""
    shutil.copy(_template(), path)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ?", (artefacts or str(path.parent / "mlruns" / "0"),)
        )
    connection.close()
    return f"sqlite:///{path}"


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[s3fs.S3FileSystem]:
    """A real HTTP server that speaks S3, with a bucket; fsspec and programs that are started find it."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Buckets belong to the process, not to the server. A proxy of the machine is not for loopback.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    known = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    known["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.mkdir(bucket)
        yield store
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[Registry]:
    """A new store in a folder, which is the working folder inside; errors of the store are ours."""
    from pipelines.registry.model_versions import Registry

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_EXPERIMENT_ID", "")
        patch.delenv("PLANES_TRACEBACK", raising=False)
        yield Registry.connect(new_store(folder / "mlflow.db"))
