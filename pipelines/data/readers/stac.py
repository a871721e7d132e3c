"""Reader of STAC: an Item or an ItemCollection, of whose assets the picture is taken; without ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from models.errors import DataError
from models.images.decoding import IMAGE_SUFFIXES
from pipelines.data.dataset import Dataset, scene_of, with_unique_ids
from pipelines.data.readers.annotations import make_sample
from pipelines.data.remote import AnyPath, is_url, to_path

# The asset that STAC's best practices name so, then assets by what they are for.
PICTURE = "visual"
ROLES = ("visual", "data")
# Names and roles of assets that show an image and are none.
SMALL = {"thumbnail", "overview", "preview"}
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

    Of an item's assets the one called ``visual`` is taken, else the only picture whose role is visual, or data, else the
    only picture; thumbnails and overviews are none. A relative ``href`` starts at the folder of the JSON file.

    Raises:
        DataError: an item without an id or with no picture that is the one, two of one name, or a page of a longer list.
    """
    if any(isinstance(link, dict) and link.get("rel") == "next" for link in content.get("links") or ()):
        raise DataError(f"{path}: is one page of a longer list of items; save all of them into one file")
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
    pictures = {name: asset for name, asset in assets.items() if isinstance(asset, dict) and _is_picture(name, asset)}
    if PICTURE in pictures:
        return str(pictures[PICTURE]["href"])
    for role in ROLES:
        named = [name for name, asset in pictures.items() if role in (asset.get("roles") or ())]
        if len(named) > 1:
            # Bands, or a map of classes beside them.
            raise DataError(f"{where} has several assets of the role {role}, none called visual: {', '.join(named)}")
        if named:
            return str(pictures[named[0]]["href"])
    if len(pictures) != 1:
        what = "several assets that are pictures, none called visual" if pictures else "no asset that is a picture"
        raise DataError(f"{where} has {what}; it has: {', '.join(pictures or assets) or 'none'}")
    return str(next(iter(pictures.values()))["href"])


def _is_picture(name: str, asset: Mapping[str, Any]) -> bool:
    href, roles = asset.get("href"), asset.get("roles") or ()
    if not isinstance(href, str) or SMALL & {name.lower(), *(str(role).lower() for role in roles)}:
        return False
    named_so = name == PICTURE and not asset.get("type")
    typed = str(asset.get("type", "")).lower().startswith(TYPES)
    return named_so or typed or urlsplit(href).path.lower().endswith(IMAGE_SUFFIXES)


def _place(href: str, path: AnyPath) -> AnyPath:
    if isinstance(path, Path):
        return to_path(href) if is_url(href) or Path(href).is_absolute() else path.parent / href
    # What a web page says of its neighbours is never a file of this machine.
    if href.startswith("file:"):
        raise DataError(f"{path}: {href} is a file of the machine that wrote it")
    return to_path(href if is_url(href) else urljoin(str(path), href))
