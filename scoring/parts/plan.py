"""The plan of a job in parts: all that decides its rows, and its images, some thousand in a file."""

from __future__ import annotations

import hashlib
import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import DataError, one_line
from models.images.rendering import Rendering
from pipelines.data.dataset import Dataset
from pipelines.data.readers.annotations import make_sample
from pipelines.data.remote import ASKING, to_path
from pipelines.evaluation.categories import PLANE
from scoring.jobs.manifest import PLAN, Generation, Manifest, digest_in_order
from scoring.parts.place import Place

SUMMARY = "summary.json"
# Folders of the place, each with a file for each part.
INPUTS, INSTANCES, ERRORS, DONE = "inputs", "instances", "errors", "done"
# The plans of updates, a file each, and what they have taken from the tables.
GENERATIONS, GONE = "generations", "gone"
UPDATE_FILE = re.compile(r"\d{6}\.json")
# Folders of lists of images: those of a plan, and those that an update takes away.
FIRST_LISTS = re.compile(r"plan-[0-9a-f]{16}")
LISTS = re.compile(r"(plan-|plan-\d{4,}-|removed-\d{4,}-)[0-9a-f]{16}")
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
        generation: 1 for the plan that a job begins with, one more for each update.
        first: number of its first part, which is after those of the generation before.
        removed: folder with a file for each earlier part that has images which are gone, or which are scored anew.
        losing: numbers of those parts.
        follows: digest of the plan of the generation before.
        news: what an update found.
        later: the plans of the updates since, oldest first; each lies in a file of its own.
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
    generation: int = 1
    first: int = 0
    removed: str = ""
    losing: tuple[int, ...] = ()
    follows: str = ""
    news: Generation | None = None
    later: tuple[Plan, ...] = ()

    @property
    def digest(self) -> str:
        """Of all but times and counts, 16 hex digits: two plans that have it in common have the same parts."""
        content = self.model_dump_json(exclude={"planned", "news", "later"})
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """As it is written down: the later ones have files of their own."""
        return self.model_dump_json(indent=2, exclude={"later"}) + "\n"

    @property
    def generations(self) -> tuple[Plan, ...]:
        """This plan and the later ones."""
        return (self, *self.later)

    @property
    def numbers(self) -> range:
        """The parts of all generations."""
        last = self.generations[-1]
        return range(self.first, last.first + last.parts)

    @property
    def all_inputs(self) -> str:
        """Digest of the images of all generations."""
        if not self.later:
            return self.inputs
        return hashlib.sha256("".join(one.digest for one in self.generations).encode()).hexdigest()[:16]

    def of(self, number: int) -> Plan:
        """The generation that a part belongs to."""
        return self.generations[bisect_right([one.first for one in self.generations], number) - 1]

    @property
    def parts(self) -> int:
        """How many parts this generation has."""
        return -(-self.images // self.part_size)

    @property
    def folder(self) -> str:
        """Where the lists of images are, of each plan in a folder of its own: two that are made at once do not mix."""
        cut = hashlib.sha256(f"{self.inputs} {self.part_size}".encode()).hexdigest()[:16]
        # The same images may be news twice, in parts of other numbers.
        return f"plan-{cut}" if self.generation == 1 else f"plan-{self.generation:04d}-{cut}"

    def size(self, number: int) -> int:
        """Images of a part."""
        return min(self.part_size, self.images - (number - self.first) * self.part_size)

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


def update_file(generation: int) -> str:
    """The file of an update's plan.

    >>> update_file(2)
    '000002.json'
    """
    return f"{generation:06d}.json"


def numbers_of(names: Sequence[str]) -> set[int]:
    """The parts that files are of; what others keep there counts as none.

    >>> sorted(numbers_of(["part-000012.json", "part-1000000.json", "notes.txt"]))
    [12, 1000000]
    """
    stems = [name.removeprefix("part-").rpartition(".")[0] for name in names if name.startswith("part-")]
    return {int(stem) for stem in stems if stem.isdigit()}


def read_plan(place: Place) -> Plan | None:
    """The plan of a place with those of its updates, None where there is none.

    Raises:
        DataError: one of them is damaged or of another release.
    """
    plan = _read(place, PLAN)
    if plan is None:
        return None
    updates = sorted(name for name in place.names(GENERATIONS) if UPDATE_FILE.fullmatch(name))
    with ThreadPool(ASKING if place.local is None else 1) as pool:
        later = [one for one in pool.map(lambda name: _read(place, f"{GENERATIONS}/{name}"), updates) if one is not None]
    for before, one in pairwise((plan, *later)):
        if (one.generation, one.follows) != (before.generation + 1, before.digest):
            name = f"{GENERATIONS}/{update_file(one.generation)}"
            raise DataError(f"{place}/{name}: is no update of the plan before it; score with --fresh")
    return plan.model_copy(update={"later": tuple(later)})


def _read(place: Place, name: str) -> Plan | None:
    try:
        return Plan.model_validate_json(place.read(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(f"{place}/{name}: damaged or of another release; score with --fresh") from error
