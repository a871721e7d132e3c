"""The manifest of a scoring job, written before it begins: model, settings, inputs, shards."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import DataError, OutputError, one_line
from models.images.rendering import DEFAULT, Rendering
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.remote import UNREADABLE, absolute, to_path
from pipelines.evaluation.categories import PLANE
from pipelines.files import flush, replacing
from scoring.requests import TORCH
from scoring.writers.layer import FILES as LAYER_FILES

MANIFEST, INPUTS, SHARDS, DONE, LOCK = "manifest.json", "inputs.parquet", "shards", "done.json", ".lock"
# Of a job in parts (scoring.parts), which has no manifest.
PLAN = "plan.json"
# Of `score --update`: what it works in, the finished generation there that takes the job's place, and results of images
# that are not among the inputs any more.
STAGING, NEWEST, GONE = ".update", "newest", "gone"
SPENT = ".update.spent"
# What says which outputs have been written and logged, and the run that logs them, until it is complete.
LOGGED, UNLOGGED = ".logged", ".run"

# All that a job writes beside its manifest; ``.run`` is the MLflow run that is being logged (scoring.jobs.mlflow_log).
WRITTEN = (
    "instances.parquet",
    "errors.parquet",
    "coco_results.json",
    "kaggle.csv",
    "metrics.json",
    UNLOGGED,
    LOGGED,
    *LAYER_FILES,
    DONE,
    INPUTS,
)
PICTURES = {"overlays": ".jpg", "geojson": ".geojson"}

INPUT_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("number", pa.int64()),
        ("digest", pa.string()),
        ("generation", pa.int32()),
    ]
)


class Generation(BaseModel):
    """What one scoring of a folder found among its inputs.

    Attributes:
        number: counted from 1; column ``generation`` of the list of inputs says in which one an image was scored.
        at: when it was finished, or the first one begun; ISO 8601.
        images: how many inputs there were.
        new: of them, not known before.
        changed: whose file was another one before.
        retried: that had failed before.
        returned: that had been gone.
        kept: as they were.
        unreadable: of those that were kept, files that cannot be looked at now; their rows are of an earlier time.
        gone: images that were known and are no input any more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    KINDS: ClassVar = ("kept", "returned", "new", "changed", "retried")

    number: int
    at: str
    images: int
    new: int = 0
    changed: int = 0
    retried: int = 0
    returned: int = 0
    kept: int = 0
    unreadable: int = 0
    gone: int = 0


class Manifest(BaseModel):
    """All that decides a job's rows.

    Attributes:
        format: of the manifest.
        label: of the version.
        model: digest of the saved folder.
        settings: threshold, tiling, batch, device, ...
        data: name of the data set.
        split: of the data set.
        category_id: number of the category in COCO results.
        inputs: digest of the images in their order.
        images: how many.
        shard_size: images of a shard.
        category: what is looked for.
        generations: of a job that was brought up to date, the last one being what the folder holds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    label: str
    model: str
    settings: dict[str, Any]
    data: str
    split: str
    category_id: int
    inputs: str
    images: int
    shard_size: int
    category: str = PLANE
    generations: tuple[Generation, ...] = ()

    def shards(self) -> list[range]:
        """Positions of each shard's images among the inputs."""
        return [range(a, min(a + self.shard_size, self.images)) for a in range(0, self.images, self.shard_size)]


def make_manifest(label: str, model: str, settings: Mapping[str, Any], *, dataset: Dataset, shard_size: int) -> Manifest:
    """The manifest of a job over a data set."""
    return Manifest(
        label=label,
        model=model,
        settings=dict(settings),
        data=dataset.name,
        split=dataset.split,
        category_id=dataset.category_id,
        inputs=digest_in_order(dataset),
        images=len(dataset),
        shard_size=shard_size,
        category=dataset.category,
    )


def digest_in_order(dataset: Dataset, file_digests: Sequence[str] | None = None, as_in_060: bool = False) -> str:
    """Of images, annotations and order: shards count the images. See `Dataset.digest_with`."""
    fingerprints = file_digests or dataset.file_digests()
    content = dataset.digest_with(fingerprints, as_in_060) if file_digests or as_in_060 else dataset.digest()
    digest = hashlib.sha256(content.encode())
    for sample in dataset.samples:
        digest.update(b"\0" + sample.image_id.encode())
    return digest.hexdigest()[:16]


@contextmanager
def claimed(
    folder: Path, manifest: Manifest, dataset: Dataset, *, fresh: bool = False, update: bool = False
) -> Iterator[Manifest | None]:
    """Hold a job's folder: write the manifest and the list of inputs, or go on where an equal job stopped.

    Args:
        fresh: throw away what a job left there, whatever it was.
        update: accept a job that differs in its inputs alone.

    Yields:
        The manifest of the job that is there, if it has other inputs.

    Raises:
        DataError: the folder holds a job of another model, other settings or inputs (saying which).
        OutputError: another process is working there.
    """
    try:
        with FileLock(folder / LOCK, timeout=0):
            held = None
            _remove_spent(folder)
            complete_update(folder)
            if fresh:
                # First of all: where what follows is interrupted, the next call finds no job and clears the rest.
                (folder / MANIFEST).unlink(missing_ok=True)
            if (folder / MANIFEST).exists():
                there = read_manifest(folder)
                alike = _exactly(folder, there, manifest, dataset) if update else _equal(folder, there, manifest, dataset)
                if not alike:
                    if not update or not differ_in_inputs_alone(there, manifest):
                        raise DataError(_refusal(folder, there, manifest, dataset))
                    held = there
            else:
                clear(folder)
                with replacing(folder / INPUTS, durable=True) as temporary:
                    pq.write_table(input_rows(dataset), temporary, compression="zstd")
                with replacing(folder / MANIFEST, durable=True) as temporary:
                    temporary.write_text(manifest.model_dump_json(indent=2) + "\n")
            yield held
    except Timeout as error:
        raise OutputError(f"{folder}: another score is writing there; wait for it or name another --out") from error


def complete_update(folder: Path) -> None:
    """Let the generation that an update has made ready take the job's place; what a stop left half done is done.

    Raises:
        OSError: the folder cannot be written.
    """
    newest = folder / STAGING / NEWEST
    if not newest.exists():
        return
    for path in sorted((newest / GONE).glob("*")):
        (folder / GONE).mkdir(exist_ok=True)
        os.replace(path, folder / GONE / path.name)
    # Made anew of the new tables, if they can be.
    for name in ("metrics.json", "kaggle.csv", "coco_results.json", LOGGED, UNLOGGED, *LAYER_FILES):
        (folder / name).unlink(missing_ok=True)
    # The manifest last: until it is there, all that comes first is done again.
    for path in sorted(newest.glob("*.*"), key=lambda p: p.name == MANIFEST):
        os.replace(path, folder / path.name)
    flush(folder)
    # In one step: pieces of it must not be taken for those of an update that was stopped.
    os.rename(folder / STAGING, folder / SPENT)
    _remove_spent(folder)


def _remove_spent(folder: Path) -> None:
    """What an update has worked in may lie on another disk, behind a link."""
    spent = folder / SPENT
    if spent.is_symlink():
        spent.unlink()
    else:
        shutil.rmtree(spent, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove the files that a job wrote into its folder, and nothing else: users may keep notes there.

    Raises:
        OSError: something of it cannot be removed; it must not be taken for another job's.
    """
    shards = folder / SHARDS
    if shards.is_symlink():
        shards.unlink()
    elif shards.exists():
        shutil.rmtree(shards)
    if not any((folder / name).exists() for name in (INPUTS, DONE)):
        # Never a job's folder: what has such names is somebody's own.
        return
    for name, ending in PICTURES.items():
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            for path in (folder / name).glob(f"*{ending}"):
                path.unlink()
            if not any((folder / name).iterdir()):
                (folder / name).rmdir()
    _clear_updates(folder)
    # The list of inputs last: while it is there, an interrupted call is gone on with.
    for name in (*(f".{name}.tmp" for name in (*WRITTEN, MANIFEST)), *WRITTEN):
        (folder / name).unlink(missing_ok=True)


def _clear_updates(folder: Path) -> None:
    _remove_spent(folder)
    if (folder / STAGING).exists() or (folder / STAGING).is_symlink():
        os.rename(folder / STAGING, folder / SPENT)
        _remove_spent(folder)
    if (folder / GONE / INPUTS).exists():
        for name in ("instances.parquet", INPUTS):
            (folder / GONE / name).unlink(missing_ok=True)
        if not any((folder / GONE).iterdir()):
            (folder / GONE).rmdir()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a job's folder.

    Raises:
        DataError: absent, damaged, or of another release.
    """
    try:
        _complete_for_readers(folder)
        held = Manifest.model_validate_json((folder / MANIFEST).read_text())
        # Releases before 0.6.1 had no other way to read image files, and up to it none but torch to run a network.
        default = {"rendering": DEFAULT.model_dump(mode="json"), "runtime": TORCH}
        return held.model_copy(update={"settings": {**default, **held.settings}})
    except FileNotFoundError as error:
        if (folder / PLAN).exists():
            raise DataError(
                f"{folder}: a scoring in parts, whose planes are in {folder}/instances/*.parquet; exports and the viewer "
                "are of scorings that are not"
            ) from error
        raise DataError(f"{folder}: not the folder of a scoring (no {MANIFEST})") from error
    except (OSError, ValidationError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: damaged or of another release; score with --fresh") from error


def _complete_for_readers(folder: Path) -> None:
    if not (folder / STAGING / NEWEST).exists():
        return
    try:
        with FileLock(folder / LOCK, timeout=0):
            complete_update(folder)
    except Timeout as error:
        raise DataError(f"{folder}: a score is writing there; wait for it") from error
    except OSError as error:
        why = error.strerror or one_line(error)
        raise DataError(
            f"{folder}: an update stopped half way and cannot be completed here ({why}); score there again"
        ) from error


def read_inputs(folder: Path, manifest: Manifest) -> Dataset:
    """The images of a job as a data set without ground truth, for exports from its table.

    Raises:
        DataError: the list is absent or damaged.
    """
    try:
        rows = pq.read_table(folder / INPUTS, partitioning=None).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder / INPUTS}: absent or damaged; score with --fresh") from error
    rendering = Rendering.model_validate(manifest.settings["rendering"])
    samples = [
        Sample(
            r["image_id"],
            to_path(r["path"]),
            height=r["height"],
            width=r["width"],
            scene=r["image_id"],
            boxes=np.zeros((0, 4), np.float32),
            masks=(),
            crowd=np.zeros(0, bool),
            truth=False,
            number=r["number"],
            rendering=rendering,
        )
        for r in rows
    ]
    return Dataset(
        manifest.data, folder, manifest.split, manifest.category, tuple(samples), category_id=manifest.category_id
    )


def input_rows(dataset: Dataset) -> pa.Table:
    """The list of inputs of a first generation."""
    columns: dict[str, list[Any]] = {name: [getattr(s, name) for s in dataset.samples] for name in ("image_id", "number")}
    # The size of a lost image is a guess, and nothing is drawn into it.
    columns |= {name: [0 if s.lost else getattr(s, name) for s in dataset.samples] for name in ("height", "width")}
    columns["path"] = [absolute(s.path) for s in dataset.samples]
    columns["digest"] = dataset.file_digests()
    columns["generation"] = [1] * len(dataset)
    return pa.Table.from_pydict(columns, schema=INPUT_SCHEMA)


def _equal(folder: Path, held: Manifest, requested: Manifest, dataset: Dataset) -> bool:
    held = held.model_copy(update={"generations": ()})
    return held == requested or (
        held.inputs != requested.inputs and _but_for_fingerprints(folder, held, requested, dataset)
    )


def _exactly(folder: Path, held: Manifest, requested: Manifest, dataset: Dataset) -> bool:
    """Whether nothing at all has changed, sizes of annotated images included, which are in no digest."""
    if held.model_copy(update={"generations": ()}) != requested:
        return False
    if not dataset.has_truth:
        return True
    sizes = ["height", "width"]
    try:
        return bool(
            pq.read_table(folder / INPUTS, partitioning=None, columns=sizes).equals(input_rows(dataset).select(sizes))
        )
    except (OSError, pa.ArrowException):
        return False


def differ_in_inputs_alone(held: Manifest, requested: Manifest) -> bool:
    """Whether two jobs have all in common but what they are over."""
    free = ("inputs", "images", "data", "split", "category_id", "generations")
    return held.model_copy(update={key: getattr(requested, key) for key in free}) == requested


def _refusal(folder: Path, held: Manifest, requested: Manifest, dataset: Dataset) -> str:
    what = [f"{k} {held.settings.get(k)}, not {v}" for k, v in requested.settings.items() if held.settings.get(k) != v]
    for key in ("label", "model", "category", "shard_size"):
        if getattr(held, key) != getattr(requested, key):
            runtimes = {held.settings.get("runtime"), requested.settings.get("runtime")}
            anew = key == "model" and held.label == requested.label and len(runtimes) == 1 and TORCH not in runtimes
            why = " (its twin was made anew since)" if anew else ""
            what.append(f"{key} {getattr(held, key)}, not {getattr(requested, key)}{why}")
    if held.inputs != requested.inputs:
        what.append(_other_inputs(folder, dataset))
    what = what or ["other data"]
    more = "--update to score what is new, " if differ_in_inputs_alone(held, requested) else ""
    return f"{folder}: holds a scoring with {'; '.join(what)}; name another --out, {more}or --fresh to score anew"


def _but_for_fingerprints(folder: Path, held: Manifest, requested: Manifest, dataset: Dataset) -> bool:
    """Whether two jobs are equal but for files of which one knows nothing: a store did not answer, a file was missing."""
    if held.model_copy(update={"inputs": requested.inputs}) != requested:
        return False
    if digest_in_order(dataset, as_in_060=True) == held.inputs:
        return True
    then = pq.read_table(folder / INPUTS, partitioning=None, columns=["digest"])["digest"].to_pylist()
    now = dataset.file_digests()
    if len(then) != len(now) or UNREADABLE not in {*then, *now}:
        return False
    fingerprints = [old if UNREADABLE in (old, new) else new for old, new in zip(then, now, strict=True)]
    return digest_in_order(dataset, fingerprints) == held.inputs


def _other_inputs(folder: Path, dataset: Dataset) -> str:
    held = {r["image_id"]: r["digest"] for r in pq.read_table(folder / INPUTS, partitioning=None).to_pylist()}
    requested = dict(zip((s.image_id for s in dataset.samples), dataset.file_digests(), strict=True))
    kinds = {
        "new": sorted(requested.keys() - held.keys()),
        "gone": sorted(held.keys() - requested.keys()),
        "changed": sorted(
            k
            for k in requested.keys() & held.keys()
            if requested[k] != held[k] and UNREADABLE not in (requested[k], held[k])
        ),
    }
    differences = [f"{len(names)} images {kind} (first: {names[0]})" for kind, names in kinds.items() if names]
    return f"other inputs: {', '.join(differences) or 'other annotations or another order'}"
