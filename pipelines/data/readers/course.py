"""Reader of the course's layout: ``train/*.png``, ``test/*.png`` and ``train.json``, a list of annotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.errors import DataError
from models.images.decoding import IMAGE_SUFFIXES
from pipelines.data.dataset import Dataset, Problems, scene_of, with_unique_ids
from pipelines.data.readers.annotations import look_at, make_sample, note_lost, read_json, read_plane
from pipelines.data.readers.coco import find_image, no_category
from pipelines.data.readers.sizes import fitted, note_fit
from pipelines.data.remote import AnyPath


def read_course(
    path: AnyPath,
    split: str = "train",
    category: str = "plane",
    *,
    scene_pattern: str | None = None,
    name: str | None = None,
    keep: bool = False,
) -> Dataset:
    """Read ``train.json``: each entry has file_name, category_name, bbox xywh, segmentation polygons.

    Images of the folder without any annotation count as images without planes. Those that
    cannot be read are left out; with ``keep`` they stay as `Sample.lost`, with their planes.

    Raises:
        DataError: not such a list, category unknown, or no image found.
    """
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(e, dict) and e.get("file_name") for e in content):
        raise DataError(f"{path}: not the course's form (a list of annotations with file_name)")
    problems = Problems()
    names = {str(e.get("category_name", "")) for e in content}
    if content and category.lower() not in {n.lower() for n in names}:
        raise no_category(path, category, names)
    grouped = _by_file(content, category, problems)
    folder = path.parent / path.stem
    # A file_name may have a folder; what counts is whether the file is named.
    named = {find_image(path.parent, name, split, path.stem) for name in grouped}
    images = list_images(folder) if folder.is_dir() else []
    others = [p.name for p in images if find_image(path.parent, p.name, split, path.stem) not in named]
    samples = []
    for file_name in [*grouped, *others]:
        file = find_image(path.parent, file_name, split, path.stem)
        mine = grouped.get(file_name, [])
        looked, lying = fitted(look_at(file), None, mine)
        if looked.lost:
            note_lost(looked.lost, keep, f"{file_name}: {looked.why}" if looked.why else file_name, problems)
            if not keep:
                continue
        file = path.parent / file_name if file is None else file
        note_fit(lying, file_name, problems)
        planes = [
            read_plane(lying.carried(e), *lying.size, f"{path.name} annotation {e.get('id', '?')}", problems) for e in mine
        ]
        scene, kept = scene_of(file.stem, scene_pattern), [p for p in planes if p]
        samples.append(make_sample(file.stem, file, lying.size, scene, kept, lost=looked.lost))
    if all(s.lost for s in samples):
        details = f": {problems.summary()}" if problems.counts else ""
        raise DataError(f"{path}: none of its images was found under {path.parent}{details}")
    samples.sort(key=lambda s: s.image_id)
    return Dataset(
        name or path.parent.resolve().name, path, split, category, with_unique_ids(samples, path), problems=problems
    )


def _by_file(content: list[Mapping[str, Any]], category: str, problems: Problems) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    seen: set[Any] = set()
    for number, entry in enumerate(content):
        mine = grouped.setdefault(str(entry["file_name"]), [])
        if str(entry.get("category_name", "")).lower() != category.lower():
            continue
        if entry.get("id") is not None and entry["id"] in seen:
            problems.add("duplicate annotation ids dropped", f"annotation {entry['id']} (entry {number})")
            continue
        seen.add(entry.get("id"))
        mine.append(entry)
    return grouped


def list_images(folder: AnyPath) -> list[AnyPath]:
    """Image files directly in a folder, by ending, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
