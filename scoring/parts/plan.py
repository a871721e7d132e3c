"""The plan of a job in parts: all that decides its rows, and its images, some thousand in a file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import DataError, one_line
from models.images.rendering import Rendering
from pipelines.data.dataset import Dataset
from pipelines.data.readers.annotations import make_sample
from pipelines.data.remote import to_path
from pipelines.evaluation.categories import PLANE
from scoring.jobs.manifest import PLAN, Manifest, digest_in_order
from scoring.parts.place import Place

SUMMARY = "summary.json"
# Folders of the place, each with a file for each part.
INPUTS, INSTANCES, ERRORS, DONE = "inputs", "instances", "errors", "done"
SCHEMA = pa.schema([("image_id", pa.string()), ("path", pa.string())])


class Plan(BaseModel):
    """All that decides the rows of a job in parts, written before it begins.

    Attributes:
        format: of the plan.
        label: of the version.
        model: digest of the saved folder.
        settings: threshold, tiling, batch, device, ...
        data: name of the data set.
        source: what was listed, as it was given.
        split: of the data set.
        category: what is looked for.
        category_id: number of the category in COCO results.
        inputs: digest of names and paths of the images in their order.
        images: how many.
        part_size: images of a part, a multiple of those of a shard.
        shard_size: images of a shard.
        planned: when they were listed, ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    label: str
    model: str
    settings: dict[str, Any]
    data: str
    source: str
    split: str
    category: str = PLANE
    category_id: int = 1
    inputs: str
    images: int
    part_size: int
    shard_size: int
    planned: str

    @property
    def digest(self) -> str:
        """Of all but the time, 16 hex digits: two plans that have it in common have the same parts."""
        return hashlib.sha256(self.model_dump_json(exclude={"planned"}).encode()).hexdigest()[:16]

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.images // self.part_size)

    @property
    def folder(self) -> str:
        """Where the lists of images are, of each plan in a folder of its own: two that are made at once do not mix."""
        return f"plan-{self.inputs}"

    def size(self, number: int) -> int:
        """Images of a part."""
        return min(self.part_size, self.images - number * self.part_size)

    def dataset(self, place: Place, number: int) -> Dataset:
        """The images of one part, without ground truth.

        Raises:
            DataError: the list is absent or damaged.
        """
        name = f"{self.folder}/{file_of(number)}"
        try:
            rows = pq.read_table(io.BytesIO(place.read(name)), schema=SCHEMA).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{place}/{name}: absent or damaged ({one_line(error, 120)}); score with --fresh") from error
        samples = tuple(
            make_sample(row["image_id"], to_path(row["path"]), (0, 0), row["image_id"], [], truth=False) for row in rows
        )
        dataset = Dataset(self.data, to_path(self.source), self.split, self.category, samples, category_id=self.category_id)
        return dataset.rendered(Rendering.model_validate(self.settings["rendering"]))

    def manifest(self, dataset: Dataset) -> Manifest:
        """The manifest of one part, which is a job of its own while it is scored."""
        shared = self.model_dump(include=set(Manifest.model_fields) - {"format", "inputs", "images"})
        return Manifest(**shared, inputs=digest_in_order(dataset), images=len(dataset))

    def refusal(self, requested: dict[str, Any]) -> str:
        """What another job would have otherwise; empty where it is the same one."""
        held = self.model_dump()
        differing = [f"{k} {held[k]}, not {v}" for k, v in requested.items() if k != "settings" and held[k] != v]
        settings = requested["settings"]
        keys = [*settings, *(k for k in self.settings if k not in settings)]
        differing += [
            f"{k} {self.settings.get(k)}, not {settings.get(k)}" for k in keys if self.settings.get(k) != settings.get(k)
        ]
        return "; ".join(differing)


def file_of(number: int, ending: str = ".parquet") -> str:
    """A part's file.

    >>> file_of(12), file_of(3, ".json")
    ('part-000012.parquet', 'part-000003.json')
    """
    return f"part-{number:06d}{ending}"


def numbers_of(names: Sequence[str]) -> set[int]:
    """The parts that files are of; what others keep there counts as none.

    >>> sorted(numbers_of(["part-000012.json", "part-1000000.json", "notes.txt"]))
    [12, 1000000]
    """
    stems = [name.removeprefix("part-").rpartition(".")[0] for name in names if name.startswith("part-")]
    return {int(stem) for stem in stems if stem.isdigit()}


def read_plan(place: Place) -> Plan | None:
    """The plan of a place, None where there is none.

    Raises:
        DataError: it is damaged or of another release.
    """
    try:
        return Plan.model_validate_json(place.read(PLAN))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(f"{place}/{PLAN}: damaged or of another release; score with --fresh") from error
