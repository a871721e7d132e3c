"""Is a version still what was registered, and does it still predict what it did?"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.errors import DataError, EngineMissing, PlanesError, RegistryError, one_line
from models.geometry.rle import checked_rle, rle_iou
from models.images.decoding import read_image
from models.instances import RLE, Instances, from_rows
from models.loading import load_model
from models.saved.folder import folder_digest
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.registry.registration import EXAMPLE_FILE
from pipelines.registry.twins import fetch_twin, twins_of, usable

MOST_BYTES = 200_000_000
# Other CPUs and numbers of threads change the last bits of a float; nothing changes this much.
PIXELS, SCORE, MASK_IOU = 0.5, 0.01, 0.98


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``passed`` is None where it could not be."""

    what: str
    passed: bool | None
    result: str


class Row(BaseModel):
    """A row of the instance table."""

    model_config = ConfigDict(extra="forbid")

    image_id: str
    instance: int
    x1: float
    y1: float
    x2: float
    y2: float
    score: float
    label: int
    height: int = Field(ge=1, le=100_000)
    width: int = Field(ge=1, le=100_000)
    mask_size: tuple[int, int] | None
    mask_counts: str | None

    @model_validator(mode="after")
    def mask_of_this_image(self) -> Row:
        """Masks are compared as images of that size, so none may claim another."""
        if self.mask_size is not None and self.mask_size != (self.height, self.width):
            raise ValueError("mask_size is not the image's size")
        if (self.mask_size is None) != (not self.mask_counts):
            raise ValueError("mask_size and mask_counts belong together")
        if self.mask_counts:
            checked_rle({"size": self.mask_size, "counts": self.mask_counts}, self.height, self.width)
        return self


class Example(BaseModel):
    """Content of a version's example: the image (base64 of a file) and the rows that it predicted when registered."""

    model_config = ConfigDict(extra="forbid")

    image: str
    rows: list[Row] = Field(max_length=100_000)

    def decoded(self) -> np.ndarray:
        """The image, RGB uint8 (H, W, 3).

        Raises:
            DataError: not an image.
        """
        try:
            return read_image(base64.b64decode(self.image, validate=True))
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{EXAMPLE_FILE}: image is not valid base64") from error


def read_example(registry: Registry, version: Resolved) -> Example | None:
    """A version's example; None where it has none (registered by a release before 0.6).

    Raises:
        RegistryError: the artefacts cannot be read, or are no example.
    """
    return registry.read_parsed(version, EXAMPLE_FILE, Example, MOST_BYTES)


def verify(registry: Registry, version: Resolved) -> list[Finding]:
    """Hash the files again, load the model, predict the example on the CPU and hold it against what was logged."""
    findings, folder = [], None
    try:
        folder = registry.fetch(version)
        if version.digest is None:
            findings.append(Finding("files", None, "no digest was noted when it was registered"))
        else:
            findings.append(Finding("files", True, f"are those of digest {folder_digest(folder)[:16]}"))
        predictor = load_model(folder, "cpu")
        findings.append(Finding("model", True, "loads"))
        example = read_example(registry, version)
        if example is None:
            findings.append(Finding("example", None, "no output was logged when it was registered"))
        else:
            predicted = predictor.predict([example.decoded()])[0].named("0")
            logged = from_rows(row.model_dump() for row in example.rows)
            finding = _compare(predicted, logged[0] if logged else None)
            if not finding.passed:
                finding = _compare_as_before(folder, example, logged[0] if logged else None) or finding
            findings.append(finding)
    except EngineMissing as error:
        findings.append(Finding("model", None, f"not loaded: {one_line(error)}"))
    except PlanesError as error:
        step = ("files", "model", "example")[min(len(findings), 2)]
        findings.append(Finding(step, False, one_line(error)))
    return findings if folder is None else [*findings, *_verify_twins(registry, version, folder)]


def _verify_twins(registry: Registry, version: Resolved, parent: Path) -> list[Finding]:
    """Whether each twin is what was measured, is this version's, and loads where this machine can use it."""
    if version.name is None:
        return []
    findings = []
    try:
        twins = twins_of(registry.version_of(version))
    except RegistryError as error:
        return [Finding("twins", False, one_line(error))]
    for twin in twins:
        what = f"twin {twin.precision}"
        try:
            folder = fetch_twin(registry, version, parent, twin)
            missing = usable(twin)
            if missing is None:
                load_model(folder, "cpu")
            files = f"files are those of digest {twin.digest[:16]}, made of this version"
            result = "loads" if missing is None else f"not loaded: {missing}"
            findings.append(Finding(what, True if missing is None else None, f"{files}; {result}"))
        except PlanesError as error:
            findings.append(Finding(what, False, one_line(error)))
    return findings


def _compare_as_before(folder: Path, example: Example, logged: Instances | None) -> Finding | None:
    """Whether the example comes out as logged where strides are guessed, as up to 0.6.1; None where it does not."""
    from models.engines.torchvision.predictor import guess_strides

    predictor = load_model(folder, "cpu")
    if not guess_strides(predictor):
        return None
    finding = _compare(predictor.predict([example.decoded()])[0].named("0"), logged)
    text = f"{finding.result}, by the strides of releases up to 0.6.1, which were wrong for an example of this size"
    return Finding("example", True, text) if finding.passed else None


def _compare(predicted: Instances, logged: Instances | None) -> Finding:
    """The example's prediction now and then, plane by plane in order of score."""
    if logged is None or not len(predicted):
        same = logged is None and not len(predicted)
        text = (
            "no plane in the example, now and when logged"
            if same
            else f"{len(predicted)} planes, {len(logged or ())} logged"
        )
        return Finding("example", same, text)
    if len(predicted) != len(logged):
        return Finding("example", False, f"{len(predicted)} planes, {len(logged)} when logged")
    pixels = float(np.abs(predicted.boxes - logged.boxes).max())
    scores = float(np.abs(predicted.scores - logged.scores).max())
    least = _least_iou(predicted.masks, logged.masks)
    passed = pixels <= PIXELS and scores <= SCORE and least >= MASK_IOU
    text = f"{len(predicted)} planes as logged: boxes within {pixels:.3g} pixels, scores within {scores:.2g}"
    return Finding("example", passed, text + ("" if predicted.masks is None else f", masks' IoU at least {least:.4f}"))


def _least_iou(predicted: Sequence[RLE] | None, logged: Sequence[RLE] | None) -> float:
    if predicted is None and logged is None:
        return 1.0
    if predicted is None or logged is None:
        return 0.0
    return min(float(rle_iou([a], [b])[0, 0]) for a, b in zip(predicted, logged, strict=True))
