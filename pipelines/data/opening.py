"""From what a user names (folder, JSON file, glob) to a Dataset."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from models.errors import DataError, one_line
from models.image import image_size
from pipelines.data.annotations import make_sample, read_json
from pipelines.data.coco import read_coco
from pipelines.data.course import list_images, read_course
from pipelines.data.dataset import Dataset, Problems, scene_of, with_unique_ids


def open_dataset(
    where: str | Path, split: str = "all", category: str = "plane", scene_pattern: str | None = None
) -> Dataset:
    """Open a COCO JSON, a course JSON, a data set folder, a folder of images, a glob, or a list of paths.

    In a folder the annotations of ``split`` are looked for as ``<split>_coco.json``,
    ``<split>.json``, ``annotations/instances_<split>.json`` (also with 2017), and
    ``<split>/_annotations.coco.json``; without any, ``<split>/`` or the folder itself
    is taken as images without ground truth. Of a single JSON file ``split`` is the label.
    ``train+test`` takes the splits of a folder one after the other. A list is a CSV or
    parquet file with a column ``path``; relative paths start at the list's own folder.

    Raises:
        DataError: nothing usable there.
    """
    path = Path(where)
    if "+" in split and path.is_dir():
        parts = [open_dataset(where, part, category, scene_pattern) for part in split.split("+")]
        samples = with_unique_ids([s for part in parts for s in part.samples], path)
        return replace(parts[0], split=split, samples=samples)
    if path.is_file() and path.suffix.lower() == ".json":
        return _read_json_file(path, path.stem.removesuffix("_coco") if split == "all" else split, category, scene_pattern)
    if path.is_file() and path.suffix.lower() in (".csv", ".parquet"):
        return _plain(_listed(path), path, split, category, scene_pattern)
    if path.is_dir():
        for candidate in _annotation_files(path, split):
            if candidate.is_file():
                return _read_json_file(candidate, split, category, scene_pattern, path.resolve().name)
        folder = path / split if (path / split).is_dir() else path
        return _plain(list_images(folder), folder, split, category, scene_pattern)
    if path.is_file():
        return _plain([path], path, split, category, scene_pattern)
    if glob.has_magic(str(where)):
        files = sorted(Path(p) for p in glob.glob(str(where), recursive=True) if Path(p).is_file())
        return _plain(files, path, split, category, scene_pattern)
    raise DataError(f"{where}: no such file or folder")


def _annotation_files(folder: Path, split: str) -> list[Path]:
    names = [f"{split}_coco.json", f"{split}.json", f"annotations/instances_{split}.json"]
    names += [f"annotations/instances_{split}2017.json", f"{split}/_annotations.coco.json"]
    return [folder / name for name in names]


def _read_json_file(path: Path, split: str, category: str, scene_pattern: str | None, name: str | None = None) -> Dataset:
    content = read_json(path)
    if isinstance(content, dict) and "images" in content:
        return read_coco(path, split, category, scene_pattern, name)
    if isinstance(content, list):
        return read_course(path, split, category, scene_pattern, name)
    raise DataError(f"{path}: neither COCO (images, annotations, categories) nor the course's list of annotations")


def _listed(path: Path) -> list[Path]:
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list ({one_line(error)[:160]})") from None
    if "path" not in table.columns:
        raise DataError(f"{path}: no column 'path'; it has: {', '.join(map(str, table.columns))}")
    return [path.parent / str(one) for one in table["path"].dropna()]


def _plain(files: list[Path], where: Path, split: str, category: str, scene_pattern: str | None) -> Dataset:
    if not files:
        raise DataError(f"{where}: no images there (PNG, JPEG, TIFF, BMP, WebP)")
    problems, samples = Problems(), []
    for file in files:
        try:
            size = image_size(file)
        except DataError:
            # Kept with size 0: whoever reads it says what is wrong with it.
            problems.add("unreadable images", str(file))
            size = (0, 0)
        samples.append(make_sample(file.stem, file, size, scene_of(file.stem, scene_pattern), [], truth=False))
    return Dataset(where.resolve().name, where, split, category, with_unique_ids(samples, where), problems)
