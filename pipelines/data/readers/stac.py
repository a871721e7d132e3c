"""Reader of STAC: an Item or an ItemCollection, of whose assets the picture is taken; without ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import DataError
from models.images.decoding import IMAGE_SUFFIXES
from pipelines.data.dataset import Dataset, scene_of, with_unique_ids
from pipelines.data.readers.annotations import make_sample
from pipelines.data.remote import AnyPath, is_url, to_path

# The asset that STAC's best practices name so, then assets by what they are for.
PICTURE = "visual"
ROLES = ("visual", "data")
TYPES = ("image/tiff", "image/jpeg", "image/png", "image/jp2", "image/webp")


def is_stac(content: Any) -> bool:
    """Whether a JSON file is an Item or an ItemCollection (STAC 1.0 and 1.1)."""
    if not isinstance(content, dict):
        return False
    features = content.get("features") if content.get("type") == "FeatureCollection" else [content]
    return isinstance(features, list) and bool(features) and all(isinstance(f, dict) and "assets" in f for f in features)


def read_stac(
    content: Mapping[str, Any], path: AnyPath, split: str, category: str, *, scene_pattern: str | None = None
) -> Dataset:
    """The images of an Item or ItemCollection, named by the items.

    Of an item's assets the one called ``visual`` is taken, else the first whose role is visual or data, else the first
    picture. A relative ``href`` starts at the folder of the JSON file.

    Raises:
        DataError: an item without an id or a picture, or two of one name.
    """
    items = content["features"] if content.get("type") == "FeatureCollection" else [content]
    samples = []
    for item in items:
        name = item.get("id")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: an item without an id")
        place = _place(_picture(item, f"{path}: item {name!r}"), path)
        samples.append(make_sample(name, place, (0, 0), scene_of(name, scene_pattern), [], truth=False))
    return Dataset(path.stem, path, split, category, with_unique_ids(samples, path))


def _picture(item: Mapping[str, Any], where: str) -> str:
    assets = item["assets"] if isinstance(item["assets"], dict) else {}
    pictures = {name: asset for name, asset in assets.items() if isinstance(asset, dict) and _is_picture(asset)}
    by_role = (k for role in ROLES for k, a in pictures.items() if role in (a.get("roles") or ()))
    chosen = PICTURE if PICTURE in pictures else next(iter((*by_role, *pictures)), None)
    if chosen is None:
        raise DataError(f"{where} has no asset that is a picture; it has: {', '.join(assets) or 'none'}")
    return str(pictures[chosen]["href"])


def _is_picture(asset: Mapping[str, Any]) -> bool:
    if not isinstance(asset.get("href"), str) or "thumbnail" in (asset.get("roles") or ()):
        return False
    return str(asset.get("type", "")).startswith(TYPES) or asset["href"].lower().endswith(IMAGE_SUFFIXES)


def _place(href: str, path: AnyPath) -> AnyPath:
    place = to_path(href)
    if is_url(href) or (isinstance(place, Path) and place.is_absolute()):
        return place
    return path.parent / href
