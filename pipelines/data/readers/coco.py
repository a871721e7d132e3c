"""Reader of COCO JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from models.errors import DataError
from pipelines.data.dataset import Dataset, Problems, scene_of, with_unique_ids
from pipelines.data.readers.annotations import MOST_SIDE, look_at, make_sample, note_lost, read_json, read_plane
from pipelines.data.readers.sizes import fitted, note_fit
from pipelines.data.remote import AnyPath


def read_coco(
    path: AnyPath,
    split: str = "all",
    category: str = "plane",
    *,
    scene_pattern: str | None = None,
    name: str | None = None,
    keep: bool = False,
) -> Dataset:
    """Read a COCO file; images are looked for beside it, in ``<split>/`` and in ``images/``.

    Images that cannot be read are left out; with ``keep`` they stay as `Sample.lost`, with their planes.
    The category is chosen by name (any case), never by number. An image entry may name its
    ``scene``. Flaws are counted in ``problems``.

    Raises:
        DataError: no COCO file, no such category, duplicate ids, or no image found.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: not a COCO file (no list of images)")
    problems = Problems()
    wanted, known = _category_ids(content, category, path)
    images = _images(content["images"], path)
    annotations = _by_image(
        content.get("annotations", []), images, wanted=wanted, known=known, path=path, problems=problems
    )
    samples = []
    for key, entry in images.items():
        file = find_image(path.parent, str(entry["file_name"]), split, path.stem)
        where, mine = f"{path.name} image {entry['file_name']}", annotations.get(key, [])
        looked, lying = fitted(look_at(file), _stated(entry), mine)
        if looked.lost:
            note_lost(looked.lost, keep, f"{where}: {looked.why}" if looked.why else where, problems)
            if not keep:
                continue
        file = path.parent / str(entry["file_name"]) if file is None else file
        note_fit(lying, where, problems)
        planes = [
            read_plane(lying.carried(a), *lying.size, f"{path.name} annotation {a.get('id', '?')}", problems) for a in mine
        ]
        scene = str(entry.get("scene") or scene_of(file.stem, scene_pattern))
        known_truth = isinstance(content.get("annotations"), list)
        number = key if isinstance(key, int) else None
        kept = [p for p in planes if p]
        samples.append(
            make_sample(file.stem, file, lying.size, scene, kept, truth=known_truth, number=number, lost=looked.lost)
        )
    if all(s.lost for s in samples):
        details = f": {problems.summary()}" if problems.counts else ""
        raise DataError(f"{path}: none of its {len(images)} images was found under {path.parent}{details}")
    chosen = with_unique_ids(samples, path)
    first = min((i for i in wanted if isinstance(i, int)), default=1)
    return Dataset(name or path.parent.resolve().name, path, split, category, chosen, problems=problems, category_id=first)


def find_image(root: AnyPath, file_name: str, split: str, stem: str) -> AnyPath | None:
    """The file of an image entry: beside the JSON, in the folder of its split, or in ``images/``."""
    named = stem.removesuffix("_coco").removeprefix("instances_")
    for folder in (".", split, named, "images", f"images/{split}", f"images/{named}"):
        candidate = root / folder / file_name
        if candidate.is_file():
            return candidate
    # A COCO file in annotations/ has its images beside that folder.
    return find_image(root.parent, file_name, split, stem) if root.name == "annotations" else None


def no_category(path: AnyPath, category: str, names: Iterable[str]) -> DataError:
    """The error for annotations that name the class otherwise."""
    known = ", ".join(sorted(names)) or "none"
    return DataError(
        f"{path}: no category {category!r}; it has: {known}; rename it there, or train with --set data.category=NAME"
    )


def _category_ids(content: Mapping[str, Any], category: str, path: AnyPath) -> tuple[set[Any], set[Any]]:
    """(ids of the wanted category, all known ids)."""
    categories = content.get("categories")
    if not isinstance(categories, list):
        if content.get("annotations"):
            raise DataError(f"{path}: no list of categories, so {category!r} cannot be found by name")
        return set(), set()
    names = {c.get("id"): str(c.get("name", "")) for c in categories if isinstance(c, dict)}
    ids = {i for i, name in names.items() if name.lower() == category.lower()}
    if not ids:
        raise no_category(path, category, names.values())
    return ids, set(names)


def _images(entries: list[Any], path: AnyPath) -> dict[Any, Mapping[str, Any]]:
    images: dict[Any, Mapping[str, Any]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "id" not in entry or not entry.get("file_name"):
            raise DataError(f"{path}: images[{number}] has no id or file_name")
        if entry["id"] in images:
            raise DataError(f"{path}: image id {entry['id']} appears twice")
        images[entry["id"]] = entry
    return images


def _by_image(
    entries: Any, images: Mapping[Any, Any], *, wanted: set[Any], known: set[Any], path: AnyPath, problems: Problems
) -> dict[Any, list[Mapping[str, Any]]]:
    grouped: dict[Any, list[Mapping[str, Any]]] = {}
    seen: set[Any] = set()
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise DataError(f"{path}: annotations[{number}] has no image_id")
        where = f"annotation {entry.get('id', number)}"
        if entry.get("category_id") not in known:
            problems.add("annotations of unknown categories dropped", where)
            continue
        if entry["category_id"] not in wanted:
            continue
        if entry["image_id"] not in images:
            problems.add("annotations of unknown images dropped", where)
            continue
        if entry.get("id") is not None and entry["id"] in seen:
            problems.add("duplicate annotation ids dropped", where)
            continue
        seen.add(entry.get("id"))
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped


def _stated(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that an image entry states, None where it states none that an image may have."""
    try:
        height, width = int(entry["height"]), int(entry["width"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (height, width) if 1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE else None
