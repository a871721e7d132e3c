"""Which images a version was trained on, by their content: a list of short hashes that travels with the version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipelines.data.dataset import Dataset
from pipelines.data.remote import UNREADABLE

# Artefact of a version.
TRAINING_IMAGES_FILE = "training_images.json"
# Hex digits of sha256 that are kept: 64 bits tell any number of images apart.
DIGITS = 16


class TrainingImages(BaseModel):
    """The images that decided a version's weights: those trained on and those validated on, whole files.

    images: hash of a file's bytes -> name of the image; unknown: components of a composition of which
    nothing is known, such as ``detector planes-det/1``.
    """

    model_config = ConfigDict(extra="forbid")

    images: dict[str, str] = Field(default_factory=dict)
    unknown: list[str] = Field(default_factory=list)

    def shared_with(self, dataset: Dataset) -> list[str]:
        """Names of a data set's images that are among them, whatever their files are called there."""
        digests = content_digests(dataset)
        return sorted(sample.image_id for sample in dataset.samples if digests.get(str(sample.path)) in self.images)


def content_digests(dataset: Dataset) -> dict[str, str]:
    """Path -> short hash of the file's bytes; files that cannot be read are left out, tiles share that of their file."""
    digests: dict[str, str] = {}
    fingerprints = dataset.file_digests() if dataset.has_truth else [""] * len(dataset)
    for sample, mark in zip(dataset.samples, fingerprints, strict=True):
        path = str(sample.path)
        if path in digests:
            continue
        try:
            # What tells whether a file elsewhere has changed is no hash of its bytes.
            local = isinstance(sample.path, Path) and dataset.has_truth
            digest = mark if local else hashlib.sha256(sample.path.read_bytes()).hexdigest()
        except Exception:
            continue
        if digest != UNREADABLE:
            digests[path] = digest[:DIGITS]
    return digests


def images_of(*datasets: Dataset | None) -> TrainingImages:
    """The images of data sets that a version is trained and validated on."""
    images: dict[str, str] = {}
    for dataset in datasets:
        digests = content_digests(dataset) if dataset is not None else {}
        for sample in dataset.samples if dataset is not None else ():
            if str(sample.path) in digests:
                images.setdefault(digests[str(sample.path)], sample.image_id)
    return TrainingImages(images=images)


def united(components: Mapping[str, TrainingImages | None]) -> TrainingImages:
    """What a composition of these components was trained on; ``components`` by their names."""
    images: dict[str, str] = {}
    unknown: list[str] = []
    for name, component in components.items():
        images |= component.images if component else {}
        unknown += [name] if component is None else component.unknown
    return TrainingImages(images=images, unknown=unknown)
