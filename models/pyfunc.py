"""Serving face of a saved model, logged to MLflow as code: no pickle, table in, instance table out.

Input: a table with a column ``image``, each a base64-encoded image file (also as a ``data:`` URL) or,
where the process is no server, a file path. Output: the instance table; ``image_id`` is the row's number. This file is
copied beside the version and may import ours only after the check below.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import sys
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

# What answers requests over HTTP: `mlflow models serve` and its images, and MLServer.
SERVERS = ("mlflow.pyfunc.scoring_server.app", "mlserver")


def code_digest(folder: Path) -> str:
    """sha256 over names and contents of the Python files of a package folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def refuse_foreign_package(logged: Path) -> None:
    """Raise where the imported package ``models`` is not the one this version was logged with.

    MLflow puts the version's code first on the path, but a package that is already
    imported under that name stays: the version would silently run other code.
    """
    import models

    origin = getattr(models, "__file__", None)
    imported = Path(origin).parent if origin else None
    if imported is None or code_digest(imported) != code_digest(logged):
        raise mlflow.MlflowException(
            f"this version needs its own package 'models', but another one is already imported from "
            f"{imported or models}; load it in a process of its own (mlflow models predict, or a new Python)"
        )


def paths_allowed() -> bool:
    """Whether rows may be paths of files: as ``PLANES_ALLOW_PATHS`` (1 or 0) says, else where no server asks.

    Whoever may send a request must not learn which files a server has, nor have it read them. Nothing
    in a request changes the answer.
    """
    given = os.environ.get("PLANES_ALLOW_PATHS")
    if given is not None:
        return given == "1"
    return not any(name in sys.modules for name in SERVERS)


def image_bytes(value: object, paths: bool) -> bytes | str:
    """The bytes of a base64 text, or where ``paths`` are allowed, a path as it is.

    Raises:
        MlflowException: neither.
    """
    if isinstance(value, bytes):
        return value
    text = str(value)
    # No look at the disk where paths are not allowed: an answer, or its time, would tell what is there.
    if paths and len(text) < 4096 and os.path.exists(text):
        return text
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        shown = f"{text[:80]!r}{'...' if len(text) > 80 else ''}"
        hint = (
            "no such file"
            if paths
            else "this server takes no paths; set PLANES_ALLOW_PATHS=1 where it starts to allow them"
        )
        raise mlflow.MlflowException(
            f"image {shown}: not a base64-encoded image file ({hint})", error_code=INVALID_PARAMETER_VALUE
        ) from error


class PlanesModel(PythonModel):
    """MLflow's wrapper around a Predictor."""

    def load_context(self, context) -> None:  # type: ignore[no-untyped-def]
        """Check the imported code, then load the saved folder onto a GPU if there is one."""
        folder = Path(context.artifacts["model"])
        refuse_foreign_package(folder.parent.parent / "code" / "models")
        from models.loading import load_model
        from models.saved.spec import read_spec

        self.rendering = read_spec(folder).rendering
        self.predictor = load_model(folder, os.environ.get("PLANES_DEVICE", "auto"))

    def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]
        """Instance table of the images in column ``image``, image by image."""
        from models.images.decoding import read_image
        from models.instances import TABLE_COLUMNS, to_rows

        rows, paths = [], paths_allowed()
        for number, value in enumerate(model_input["image"]):
            instances = self.predictor.predict([read_image(image_bytes(value, paths), self.rendering)])[0]
            rows += to_rows([instances.named(str(number))])
        return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))


mlflow.models.set_model(PlanesModel())
