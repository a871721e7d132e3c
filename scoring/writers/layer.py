"""One map layer of all georeferenced images of a job: GeoPackage or GeoParquet, in one coordinate system."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import DataError, ModelError, one_line
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.files import replacing
from scoring.requests import LayerSettings
from scoring.writers.ground import Georeference, georeference, outline, reprojected
from scoring.writers.walk import side_by_side

if TYPE_CHECKING:
    import geopandas

NAME = "planes"
ENDINGS = {"geopackage": ".gpkg", "geoparquet": ".parquet"}
# The file's name beside the instance table, which has the ending too.
FILE = "planes"
FILES = tuple(f"{FILE}{ending}" for ending in ENDINGS.values())
# Share of the smaller outline, or of both together, from which two detections are of one plane.
SAME = 0.5
# Pixels from the border of an image within which a box counts as cut by it.
BORDER = 2.0


@dataclass
class _Columns:
    """The layer's rows so far."""

    geometry: list[Any]
    image: list[str]
    time: list[str]
    instance: list[int]
    score: list[float]
    label: list[int]
    cut: list[bool]


def write_layers(
    predictions: Iterable[Instances],
    dataset: Dataset,
    folder: Path,
    formats: Sequence[str],
    *,
    version: str,
    settings: LayerSettings,
) -> int:
    """Write ``planes.gpkg`` or ``planes.parquet`` with a row for each plane of the georeferenced images.

    Columns: image, time (of the file's tag, or found in the image's name), version, instance, score, label, seen (how
    many images show the plane; 1 unless ``settings.dedupe``), and the outline in ``settings.crs``. With ``dedupe`` a
    plane that overlapping images of one time show is there once: as an image shows it that does not cut it, then as the
    surest.

    Args:
        formats: of `ENDINGS`.
        version: label of the version.

    Returns:
        How many rows.

    Raises:
        DataError: no image has a coordinate system, no such system, an image with planes that cannot be read, or a
            pattern that is none.
        ModelError: geopandas is not installed.
    """
    frame = _frame(predictions, dataset, version=version, settings=settings)
    for name in formats:
        path = folder / f"{FILE}{ENDINGS[name]}"
        with replacing(path) as temporary:
            if name == "geoparquet":
                frame.to_parquet(temporary, compression="zstd", index=False)
            else:
                # GDAL goes by the ending.
                named = temporary.with_name(f"{temporary.name}.gpkg")
                named.unlink(missing_ok=True)
                frame.to_file(named, layer=NAME, driver="GPKG", engine="pyogrio")
                named.replace(temporary)
    return int(len(frame))


def _frame(
    predictions: Iterable[Instances], dataset: Dataset, *, version: str, settings: LayerSettings
) -> geopandas.GeoDataFrame:
    try:
        import geopandas
    except ImportError as error:
        raise ModelError("a map layer needs geopandas and pyogrio: pip install geopandas pyogrio") from error
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        target = CRS.from_user_input(settings.crs)
    except CRSError as error:
        raise DataError(f"--crs {settings.crs}: no coordinate system ({one_line(error, 120)})") from error
    if not target.is_projected and not target.is_geographic:
        raise DataError(f"--crs {settings.crs}: is neither geographic nor projected; give one of a map, such as EPSG:4326")
    rows, images = _Columns([], [], [], [], [], [], []), 0
    for sample, one in side_by_side(predictions, dataset):
        if one is None and images:
            continue
        place = georeference(sample.path) if one is not None else _place_if_any(sample)
        if place is None:
            continue
        images += 1
        if one is None:
            continue
        time = _time_of(sample, settings.time_pattern) or place.time
        for i in range(len(one)):
            polygons = outline(one, i, place.transform)
            if place.crs != target:
                polygons = reprojected(polygons, place.crs, target)
            rows.geometry.append(_shape(polygons))
            rows.image.append(sample.image_id)
            rows.time.append(time)
            rows.instance.append(i)
            rows.score.append(float(one.scores[i]))
            rows.label.append(int(one.labels[i]))
            rows.cut.append(_is_cut(one, i))
    if not images:
        raise DataError(f"{dataset.name}: none of {len(dataset)} images has a coordinate system (georeferenced TIFFs have)")
    # What one image shows as a plane is not what another one shows as a helicopter.
    kinds = [f"{label} {time}" for label, time in zip(rows.label, rows.time, strict=True)]
    kept, seen = (
        planes_seen_once(rows.geometry, rows.image, kinds, scores=rows.score, cut=rows.cut)
        if settings.dedupe
        else (list(range(len(rows.image))), [1] * len(rows.image))
    )
    columns = {name: [getattr(rows, name)[i] for i in kept] for name in ("image", "time", "instance", "score", "label")}
    columns |= {"version": [version] * len(kept), "seen": seen}
    ordered = {name: columns[name] for name in ("image", "time", "version", "instance", "score", "label", "seen")}
    return geopandas.GeoDataFrame(ordered, geometry=[rows.geometry[i] for i in kept], crs=settings.crs)


def _place_if_any(sample: Sample) -> Georeference | None:
    """Of an image without planes, which need not be readable any more."""
    try:
        return georeference(sample.path)
    except DataError:
        return None


def _time_of(sample: Sample, pattern: str | None) -> str:
    if pattern is None:
        return ""
    match = _compiled(pattern).search(sample.image_id)
    return "" if match is None else match.group(1) if match.groups() else match.group(0)


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(f"--time-pattern {pattern!r}: is no regular expression ({error})") from error


def _shape(polygons: list[list[np.ndarray]]) -> Any:
    import shapely

    made = [shapely.Polygon(rings[0], rings[1:]) for rings in polygons]
    return made[0] if len(made) == 1 else shapely.MultiPolygon(made)


def _is_cut(instances: Instances, i: int) -> bool:
    x1, y1, x2, y2 = instances.boxes[i]
    return bool(x1 < BORDER or y1 < BORDER or x2 > instances.width - BORDER or y2 > instances.height - BORDER)


def planes_seen_once(
    outlines: Sequence[Any], images: Sequence[str], kinds: Sequence[str], *, scores: Sequence[float], cut: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Detections of which none is the plane of another one, and in how many images each was seen.

    Two detections are of one plane where they are of different images and one kind (class and time), and overlap: an IoU of
    at least `SAME`, or, where an image's border cuts one of them, that share of the smaller outline. Of each image a
    plane takes at most one, the one that overlaps most, so that two planes side by side stay two. Whole ones come before
    cut ones, then the higher score; overlaps are ratios of areas, which every map keeps in so small a place.

    Returns:
        Indices of those that are kept, in their order; how many images show each.
    """
    import shapely

    if not len(outlines):
        return [], []
    geometry = np.array(outlines, dtype=object)
    # Pixels that touch at a corner alone make a polygon that touches itself.
    geometry = np.where(shapely.is_valid(geometry), geometry, shapely.buffer(geometry, 0))
    first, second = shapely.STRtree(geometry).query(geometry, predicate="intersects")
    image, kind = (np.unique(names, return_inverse=True)[1] for names in (list(images), list(kinds)))
    apart = (first < second) & (image[first] != image[second]) & (kind[first] == kind[second])
    first, second = first[apart], second[apart]
    shared = shapely.area(shapely.intersection(geometry[first], geometry[second]))
    areas = shapely.area(geometry)
    union, smaller = areas[first] + areas[second] - shared, np.minimum(areas[first], areas[second])
    either = np.array(cut, bool)[first] | np.array(cut, bool)[second]
    overlaps = np.where(either, shared / np.maximum(smaller, 1e-300), shared / np.maximum(union, 1e-300))
    neighbours: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    for i, j, overlap in zip(first.tolist(), second.tolist(), overlaps.tolist(), strict=True):
        if overlap >= SAME:
            neighbours[i].append((overlap, j))
            neighbours[j].append((overlap, i))
    order = sorted(range(len(outlines)), key=lambda i: (cut[i], -scores[i], i))
    gone: set[int] = set()
    seen = [1] * len(outlines)
    for i in order:
        if i in gone:
            continue
        taken: set[str] = set()
        for _, j in sorted(neighbours[i], key=lambda pair: (-pair[0], pair[1])):
            if j not in gone and images[j] not in taken:
                taken.add(images[j])
                gone.add(j)
        seen[i] += len(taken)
    kept = [i for i in range(len(outlines)) if i not in gone]
    return kept, [seen[i] for i in kept]
