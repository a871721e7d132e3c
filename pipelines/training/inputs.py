"""Inputs of a training, image by image: it resumes where images that it could not read have been removed since."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.data.dataset import Dataset
from pipelines.data.loading.unreadable import Unreadable
from pipelines.files import write_text

INPUTS_FILE = "inputs.json"


class Inputs(BaseModel):
    """Content of inputs.json.

    Attributes:
        settings: digest of recipe and code.
        train: image id -> path and digest of the image and its annotations.
        val: as ``train``.
    """

    model_config = ConfigDict(extra="forbid")

    settings: str
    train: dict[str, tuple[str, str]]
    val: dict[str, tuple[str, str]]

    @classmethod
    def of(cls, settings: str, train: Dataset, val: Dataset | None) -> Inputs:
        """The inputs of a training."""
        return cls(settings=settings, train=_images(train), val=_images(val) if val else {})

    def continued_by(self, other: Inputs, unreadable: Sequence[str]) -> bool:
        """Whether the others are these but for images that are unreadable (their paths)."""
        held, requested = {**self.train, **self.val}, {**other.train, **other.val}
        same = all(image_id in held and held[image_id][1] == digest for image_id, (_, digest) in requested.items())
        gone = [path for image_id, (path, _) in held.items() if image_id not in requested]
        return self.settings == other.settings and same and set(gone) <= set(unreadable)


def _images(dataset: Dataset) -> dict[str, tuple[str, str]]:
    digests = dataset.sample_digests()
    return {s.image_id: (str(s.path), digest) for s, digest in zip(dataset.samples, digests, strict=True)}


@dataclass(frozen=True)
class Earlier:
    """A training that was begun with more images: its folder, the ids of its training and validation images."""

    folder: Path
    train: tuple[str, ...]
    val: tuple[str, ...]
    removed: int


def find_earlier(work: Path, name: str, requested: Inputs) -> Earlier | None:
    """The folder ``<name>-<key>`` of a training of these inputs and of images that it could not read."""
    for path in sorted(work.glob(f"*/{INPUTS_FILE}")):
        folder = path.parent
        if not re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{12}}", folder.name):
            continue
        unreadable = Unreadable(folder).messages()
        try:
            held = Inputs.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if unreadable and held.continued_by(requested, list(unreadable)):
            removed = len(held.train) + len(held.val) - len(requested.train) - len(requested.val)
            return Earlier(folder, tuple(held.train), tuple(held.val), removed)
    return None


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Note them in a training's folder, unless they are noted there already."""
    path = folder / INPUTS_FILE
    if path.exists():
        return
    write_text(path, json.dumps(inputs.model_dump()))
