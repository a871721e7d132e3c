"""From a user's path (folder, JSON file, glob, URL) to a Dataset."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import DataError, did_you_mean, one_line
from pipelines.data.dataset import Dataset, Problems, scene_of, with_unique_ids
from pipelines.data.readers.annotations import make_sample, read_json
from pipelines.data.readers.coco import read_coco
from pipelines.data.readers.course import list_images, read_course
from pipelines.data.readers.stac import is_stac, read_stac
from pipelines.data.remote import AnyPath, is_url, list_remote, to_path

if TYPE_CHECKING:
    from upath import UPath

# Folders of images that are splits even where nothing is annotated.
USUAL_SPLITS = ("train", "val", "valid", "validation", "test")


def open_dataset(
    where: str | Path, split: str = "all", *, category: str = "plane", scene_pattern: str | None = None, keep: bool = False
) -> Dataset:
    """Open a COCO JSON, a course JSON, STAC items, a data set folder, a folder of images, a glob, a list, or a URL.

    In a folder the annotations of ``split`` are looked for as ``<split>_coco.json``,
    ``<split>.json``, ``annotations/instances_<split>.json`` (also with 2017), and
    ``<split>/_annotations.coco.json``; without any, ``<split>/`` or the folder itself
    is taken as images without ground truth. Of a single JSON file ``split`` is the label.
    ``train+test`` takes the splits of a folder one after the other. A list is a CSV or
    parquet file with a column ``path``, paths or URLs; relative ones start at the list's own
    folder. A URL (``s3://bucket/folder``, ``https://...``) is a JSON file, a list, an image,
    a folder of images, or a glob.

    Images without annotations are listed only: nothing is read of them here. With ``keep``
    annotated ones that cannot be read stay as `Sample.lost` instead of being left out.

    Raises:
        DataError: nothing usable there.
    """
    path = to_path(where)
    if not isinstance(path, Path):
        return _open_remote(path, split, category=category, scene_pattern=scene_pattern, keep=keep)
    if "+" in split and path.is_dir():
        datasets = [
            open_dataset(where, name, category=category, scene_pattern=scene_pattern, keep=keep)
            for name in split.split("+")
        ]
        samples = with_unique_ids([s for dataset in datasets for s in dataset.samples], path)
        problems = Problems()
        for dataset in datasets:
            for kind, count in dataset.problems.counts.items():
                problems.add(kind, dataset.problems.examples[kind])
                problems.counts[kind] += count - 1
        return replace(datasets[0], split=split, samples=samples, problems=problems)
    if path.is_file() and path.suffix.lower() == ".json":
        return _read_json_file(path, _label(path, split), category=category, scene_pattern=scene_pattern, keep=keep)
    if path.is_file() and path.suffix.lower() in (".csv", ".parquet"):
        return _plain(_listed(path), path, split=split, category=category, scene_pattern=scene_pattern)
    if path.is_dir():
        for candidate in _annotation_files(path, split):
            if candidate.is_file():
                return _read_json_file(
                    candidate, split, category=category, scene_pattern=scene_pattern, keep=keep, name=path.resolve().name
                )
        folder = images_of(path, split)
        return _plain(list_images(folder), folder, split=split, category=category, scene_pattern=scene_pattern)
    if path.is_file():
        return _plain([path], path, split=split, category=category, scene_pattern=scene_pattern)
    if glob.has_magic(str(where)):
        files = sorted(Path(p) for p in glob.glob(str(where), recursive=True) if Path(p).is_file())
        return _plain(files, path, split=split, category=category, scene_pattern=scene_pattern)
    raise _missing(where, path)


def has_annotations(folder: Path, split: str) -> bool:
    """Whether a data set folder has a file with the annotations of a split."""
    return any(candidate.is_file() for candidate in _annotation_files(folder, split))


def images_of(folder: Path, split: str) -> Path:
    """Where the images of a split are that has no annotations: in a folder of its name, else in the folder itself.

    Raises:
        DataError: the folder has splits, and none of this name.
    """
    _check_split(folder, split)
    return folder / split if (folder / split).is_dir() else folder


def splits_of(folder: Path) -> list[str]:
    """The splits of a data set folder: those with annotations, and folders named like one; none of a plain folder."""
    named = {
        "{}_coco.json": folder.glob("*_coco.json"),
        "instances_{}.json": folder.glob("annotations/instances_*.json"),
        "{}.json": (p for p in folder.glob("*.json") if (folder / p.stem).is_dir()),
    }
    splits = set()
    for pattern, paths in named.items():
        before, after = pattern.split("{}")
        splits |= {p.name.removeprefix(before).removesuffix(after).removesuffix("2017") for p in paths}
    splits |= {p.parent.name for p in folder.glob("*/_annotations.coco.json")}
    usual = {p.name for p in folder.iterdir() if p.is_dir() and p.name in USUAL_SPLITS}
    return sorted(splits | usual)


def _check_split(folder: Path, split: str) -> None:
    """Raise DataError for a split that a data set folder has not; ``all`` and plain folders of images have none."""
    known = splits_of(folder)
    if known and split not in ("all", *known) and not (folder / split).is_dir():
        raise DataError(f"{folder}: no split {split!r}; it has: {', '.join(known)}{did_you_mean(split, known)}")


def check_exists(where: str | Path) -> None:
    """Check that something of this machine exists by that name; globs and URLs are looked at when they are opened.

    Raises:
        DataError: nothing there.
    """
    path = to_path(where)
    if isinstance(path, Path) and not path.exists() and not glob.has_magic(str(where)):
        raise _missing(where, path)


def _missing(where: str | Path, path: Path) -> DataError:
    """That nothing is there, and the nearest of the first thousand names beside it."""
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [one.name for one in itertools.islice(path.parent.iterdir(), 1000)]
    return DataError(f"{where}: no such file or folder{did_you_mean(path.name, beside)}")


def _open_remote(path: UPath, split: str, *, category: str, scene_pattern: str | None, keep: bool) -> Dataset:
    if path.suffix.lower() == ".json":
        return _read_json_file(path, _label(path, split), category=category, scene_pattern=scene_pattern, keep=keep)
    files = _listed(path) if path.suffix.lower() in (".csv", ".parquet") else list_remote(path)
    return _plain(files, path, split=split, category=category, scene_pattern=scene_pattern)


def _label(path: AnyPath, split: str) -> str:
    return path.stem.removesuffix("_coco") if split == "all" else split


def _annotation_files(folder: Path, split: str) -> list[Path]:
    names = [f"{split}_coco.json", f"{split}.json", f"annotations/instances_{split}.json"]
    names += [f"annotations/instances_{split}2017.json", f"{split}/_annotations.coco.json"]
    return [folder / name for name in names]


def _read_json_file(
    path: AnyPath, split: str, *, category: str, scene_pattern: str | None, keep: bool, name: str | None = None
) -> Dataset:
    content = read_json(path)
    if isinstance(content, dict) and "images" in content:
        return read_coco(path, split, category, scene_pattern=scene_pattern, name=name, keep=keep)
    if isinstance(content, list):
        return read_course(path, split, category, scene_pattern=scene_pattern, name=name, keep=keep)
    if is_stac(content):
        return read_stac(content, path, split, category, scene_pattern=scene_pattern)
    raise DataError(
        f"{path}: neither COCO (images, annotations, categories), the course's list of annotations, nor STAC items"
    )


def _listed(path: AnyPath) -> list[AnyPath]:
    import pandas as pd

    try:
        with path.open("rb") as handle:
            table = pd.read_csv(handle, dtype=str) if path.suffix.lower() == ".csv" else pd.read_parquet(handle)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list ({one_line(error, 160)})") from error
    if "path" not in table.columns:
        raise DataError(f"{path}: no column 'path'; it has: {', '.join(map(str, table.columns))}")
    return [listed_path(path, str(one)) for one in table["path"].dropna()]


def listed_path(path: AnyPath, named: str) -> AnyPath:
    """The file that a list names; relative names start at the list's own folder."""
    return to_path(named) if is_url(named) or Path(named).is_absolute() else path.parent / named


def check_names(paths: Iterable[str], where: AnyPath | str) -> None:
    """Check that tables can hold the names of files.

    Raises:
        DataError: one is not UTF-8.
    """
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the name of {os.fsencode(path)!r} is not UTF-8; rename the file") from error


def _plain(files: Sequence[AnyPath], where: AnyPath, *, split: str, category: str, scene_pattern: str | None) -> Dataset:
    if not files:
        raise DataError(f"{where}: no images there (PNG, JPEG, TIFF, BMP, WebP)")
    check_names(map(str, files), where)
    unknown = (0, 0)
    samples = [make_sample(f.stem, f, unknown, scene_of(f.stem, scene_pattern), [], truth=False) for f in files]
    name = where.resolve().name if isinstance(where, Path) else where.name or str(where)
    return Dataset(name, where, split, category, with_unique_ids(samples, where))
