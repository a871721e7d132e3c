"""Checks that every reader of annotations shares: one raw annotation to box, mask and problems."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import DataError, one_line
from models.geometry.boxes import box_iou, clip_boxes, xywh_to_xyxy
from models.geometry.rle import checked_rle, rle_area, rle_boxes, rle_from_polygons, rle_text
from models.images.decoding import Header, image_header, read_image
from models.instances import RLE
from pipelines.data.dataset import Problems, Sample
from pipelines.data.remote import AnyPath

MOST_SIDE = 100_000

# Shared by all images without planes: a scoring may list millions.
_NO_BOXES, _NO_CROWD = np.zeros((0, 4), np.float32), np.zeros(0, bool)


# Least IoU of a plane's box and the box around its outline; a box around a rotated box may be twice as large.
LEAST_OVERLAP = 0.1


@dataclass(frozen=True)
class Plane:
    """One checked annotation."""

    box: np.ndarray
    mask: RLE | None
    crowd: bool


def read_json(path: AnyPath) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: absent, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not valid JSON ({one_line(error)})") from error


def read_plane(entry: Mapping[str, Any], height: int, width: int, where: str, problems: Problems) -> Plane | None:
    """Check one annotation; None where nothing sensible is left of it.

    A box is taken from ``bbox``, or from the outline where it is missing or odd; a
    box that leaves the image is clipped; an outline that cannot be used is dropped
    and the box kept.
    """
    mask = _mask(entry.get("segmentation"), height, width, where, problems)
    box = _box(entry.get("bbox"))
    if box is None:
        if mask is None:
            problems.add("annotations without usable box or outline dropped", where)
            return None
        problems.add("boxes taken from the outline", where)
        box = rle_boxes([mask])[0]
    elif mask is not None and box_iou(box, rle_boxes([mask]))[0, 0] < LEAST_OVERLAP:
        # One of both is of something else; which one, nobody can tell: the box stays, as where there is no outline.
        problems.add("outlines far from their box dropped", where)
        mask = None
    clipped = clip_boxes(box, height, width)[0]
    if clipped[2] - clipped[0] <= 0 or clipped[3] - clipped[1] <= 0:
        problems.add("boxes outside their image dropped", where)
        return None
    # Annotation tools write borders one pixel or so outside: not worth a word.
    if np.abs(clipped - box).max() > 1.5:
        problems.add("boxes clipped to their image", where)
    return Plane(clipped, mask, bool(entry.get("iscrowd", 0)))


def _box(value: Any) -> np.ndarray | None:
    try:
        numbers = [float(v) for v in value]
    except (TypeError, ValueError):
        return None
    if len(numbers) != 4 or not all(math.isfinite(v) for v in numbers) or numbers[2] <= 0 or numbers[3] <= 0:
        return None
    return xywh_to_xyxy([numbers])[0]


def _mask(value: Any, height: int, width: int, where: str, problems: Problems) -> RLE | None:
    if value is None or value == []:
        return None
    try:
        mask = rle_of(value, height, width) if isinstance(value, dict) else _polygons(value, height, width, where, problems)
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
        problems.add("unusable outlines dropped", f"{where}: {one_line(error, 80)}")
        return None
    if mask is not None and rle_area([mask])[0] == 0:
        problems.add("empty outlines dropped", where)
        return None
    return mask


def rle_of(value: Mapping[str, Any], height: int, width: int) -> RLE:
    """A raw COCO RLE, compressed or a list of runs, as RLE with text counts.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: of another size, or no runs that fill the image.
    """
    from pycocotools import mask as coco_mask

    if [int(v) for v in value["size"]] != [height, width]:
        raise ValueError(f"RLE of size {value['size']} in an image of [{height}, {width}]")
    if isinstance(value["counts"], list):
        counts = [int(v) for v in value["counts"]]
        if counts != value["counts"] or sum(counts) != height * width or min(counts) < 0:
            raise ValueError("RLE counts do not sum to the image")
        return rle_text(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    return checked_rle(value, height, width)


def _polygons(value: Any, height: int, width: int, where: str, problems: Problems) -> RLE | None:
    if value and isinstance(value[0], (int, float)):
        value = [value]
    good = []
    for polygon in value:
        points = [float(v) for v in polygon]
        # pycocotools walks along every edge, and breaks the process where one is billions of pixels long.
        if len(points) % 2 or len(points) < 6 or not all(abs(v) <= MOST_SIDE for v in points):
            problems.add("odd polygons dropped", f"{where}: {len(points)} numbers")
            continue
        good.append(points)
    return rle_from_polygons(good, height, width) if good else None


@dataclass(frozen=True)
class Looked:
    """State of an annotated image's file: its header, None without one; why it is lost, and in which words."""

    header: Header | None
    lost: str = ""
    why: str = ""


def look_at(file: AnyPath | None) -> Looked:
    """Whether an annotated image's file is there and can be used, ``None``: there is no file.

    A file that seems to end early is decoded to see whether it does.
    """
    if file is None:
        return Looked(None, "missing")
    header = None
    try:
        header = image_header(file)
        if header.cut:
            read_image(file)
    except Exception as error:
        # A decoder may raise anything on a damaged file. A large TIFF is read by windows, and what is missing of it
        # shows only then.
        if header is None or not isinstance(error, DataError) or error.kind != "too large":
            return Looked(header, "cut" if header else "unreadable", one_line(error, 160))
    return Looked(header)


def note_lost(lost: str, keep: bool, where: str, problems: Problems) -> None:
    """Count an annotated image whose file cannot be used; ``lost``: why, as in `Sample`."""
    kind = {"missing": "missing images", "other size": "images of another size"}.get(lost, "unreadable images")
    problems.add(f"{kind}, kept as errors" if keep else f"{kind} left out", where)


def extent(entries: Sequence[Mapping[str, Any]], stated: bool = True) -> tuple[int, int]:
    """(height, width) that annotations of an image fit into, of which nothing else is known.

    stated: whether an RLE outline reaches as far as the size it states; else its box alone tells.
    """
    height, width = 1.0, 1.0
    for entry in entries:
        box = _box(entry.get("bbox"))
        if box is not None:
            width, height = max(width, float(box[2])), max(height, float(box[3]))
        outline = entry.get("segmentation")
        try:
            if isinstance(outline, dict) and stated:
                rows, columns = (int(v) for v in outline["size"])
                height, width = max(height, rows), max(width, columns)
            for polygon in outline if isinstance(outline, list) else ():
                width, height = max(width, *map(float, polygon[0::2])), max(height, *map(float, polygon[1::2]))
        except (TypeError, ValueError, KeyError):
            # Whoever reads the outline counts it.
            continue
    # A size that no raster has would be a slip of the pen.
    return math.ceil(min(height, MOST_SIDE)), math.ceil(min(width, MOST_SIDE))


def make_sample(
    image_id: str,
    path: AnyPath,
    size: tuple[int, int],
    scene: str,
    planes: list[Plane],
    *,
    truth: bool = True,
    number: int | None = None,
    lost: str = "",
) -> Sample:
    """Build a Sample from checked planes."""
    return Sample(
        image_id,
        path,
        height=size[0],
        width=size[1],
        scene=scene,
        boxes=np.array([p.box for p in planes], np.float32) if planes else _NO_BOXES,
        masks=tuple(p.mask for p in planes),
        crowd=np.array([p.crowd for p in planes], bool) if planes else _NO_CROWD,
        truth=truth,
        number=number,
        lost=lost,
    )
