"""Serving face of a saved model, logged to MLflow as code: no pickle, table in, instance table out.

Input: a table with a column ``image``, each a base64-encoded image file (also as a ``data:`` URL) or,
where the process is no server, a file path. Output: the instance table; ``image_id`` is the row's number. ``params``
(`Params`) may ask for a higher score threshold and for other tiles. This file is copied beside the version and may import
ours only after the check below.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

# What answers requests over HTTP: `mlflow models serve` and its images, and MLServer.
SERVERS = ("mlflow.pyfunc.scoring_server.app", "mlserver")

# Rows that are predicted together, and the pixels that they may have in all: a larger image is predicted by itself.
MOST_ROWS, MOST_PIXELS = 8, 4_000_000


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
        raise refusal(f"image {shown}: not a base64-encoded image file ({hint})") from error


@dataclass(frozen=True)
class Params:
    """The params of a request; None is what the version does by itself.

    Attributes:
        score_threshold: least score of the planes in the answer, 0 to 1; the version's own least score holds besides.
        tile: side in pixels of the tiles that images are predicted by; 0: whole images.
    """

    score_threshold: float | None = None
    tile: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Params:
        """Those of a request, whose types MLflow has checked by the signature.

        Raises:
            MlflowException: a score threshold out of range.
        """
        known = {name: (given or {}).get(name) for name in ("score_threshold", "tile")}
        threshold = known["score_threshold"]
        if threshold is not None and not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise refusal(f"score_threshold {threshold:g}: expected a number from 0 to 1")
        return cls(**known)


def refusal(message: str) -> mlflow.MlflowException:
    """An error that a server answers with status 400 and one line."""
    return mlflow.MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def together(images: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Images, RGB uint8 (H, W, 3), in their order, as many at a time as are predicted together."""
    batch: list[np.ndarray] = []
    pixels = 0
    for image in images:
        size = image.shape[0] * image.shape[1]
        if batch and (len(batch) == MOST_ROWS or pixels + size > MOST_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(image)
        pixels += size
    if batch:
        yield batch


class PlanesModel(PythonModel):
    """MLflow's wrapper around a Predictor."""

    def load_context(self, context) -> None:  # type: ignore[no-untyped-def]
        """Check the imported code, then load the saved folder onto a GPU if there is one."""
        folder = Path(context.artifacts["model"])
        refuse_foreign_package(folder.parent.parent / "code" / "models")
        from models.loading import load_model
        from models.runtime.devices import pick_device
        from models.saved.spec import read_spec

        self.folder, self.rendering = folder, read_spec(folder).rendering
        self.device = pick_device(os.environ.get("PLANES_DEVICE", "auto"))
        self.predictor = load_model(folder, self.device)
        # The predictor for the tiles that a request asked for last.
        self.retiled: tuple[int | None, Any] = (None, None)

    def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]
        """Instance table of the images in column ``image``, in the order of the rows; several are predicted together."""
        from models.instances import TABLE_COLUMNS, to_rows
        from models.runtime.out_of_memory import predict_in_halves

        asked = Params.of(params)
        predictor = self._predictor(asked.tile)
        rows: list[dict[str, Any]] = []
        number = 0
        for batch in together(self._images(model_input["image"])):
            for instances in predict_in_halves(predictor, batch):
                kept = instances if asked.score_threshold is None else instances.above(asked.score_threshold)
                rows += to_rows([kept.named(str(number))])
                number += 1
        return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))

    def _images(self, values: Iterable[object]) -> Iterator[np.ndarray]:
        from models.errors import DataError, one_line
        from models.images.decoding import read_image

        paths = paths_allowed()
        for number, value in enumerate(values):
            try:
                yield read_image(image_bytes(value, paths), self.rendering)
            except (DataError, mlflow.MlflowException) as error:
                raise refusal(f"row {number}: {one_line(error, 300)}") from error

    def _predictor(self, tile: int | None) -> Any:
        from models.errors import ModelError, one_line
        from models.loading import load_retiled

        if tile is None:
            return self.predictor
        known, predictor = self.retiled
        if known != tile:
            try:
                predictor = load_retiled(self.predictor, self.folder, self.device, {"size": tile})
            except ModelError as error:
                raise refusal(f"tile {tile}: {one_line(error, 300)}") from error
            self.retiled = tile, predictor
        return predictor


mlflow.models.set_model(PlanesModel())
