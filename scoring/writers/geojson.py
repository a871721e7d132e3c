"""GeoJSON of georeferenced images, in each image's own coordinate system, made from the instance table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from models.geometry.rle import CropMask, rle_crop
from models.images.raster import quiet_rasterio, tiff_layout
from models.images.rendering import map_to_file, oriented_size
from models.images.windows import WINDOWED_SUFFIXES
from models.instances import Instances
from pipelines.data.dataset import Dataset
from pipelines.files import write_text
from scoring.writers.walk import file_stem, remove_earlier, side_by_side


def write_geojson(predictions: Iterable[Instances], dataset: Dataset, folder: Path) -> int:
    """Write ``folder/<image id>.geojson`` for each image that has a coordinate system; return how many.

    A plane is the polygon of its mask along the pixels' edges, or its box's corners. The
    coordinate system stands in the member ``crs``, as GeoJSON had it before RFC 7946 and
    as GIS programs read it.
    """
    written = 0
    remove_earlier(dataset, folder, ".geojson")
    for sample, one in side_by_side(predictions, dataset):
        path = sample.path
        placed = _georeference(path) if isinstance(path, Path) and path.suffix.lower() in WINDOWED_SUFFIXES else None
        if placed is None:
            continue
        transform, crs = placed
        features = [] if one is None else [_feature(one, i, transform) for i in range(len(one))]
        content = {"type": "FeatureCollection", "name": sample.image_id, "crs": crs, "features": features}
        write_text(folder / f"{file_stem(sample.image_id)}.geojson", json.dumps(content))
        written += 1
    return written


def _georeference(path: Path) -> tuple[Any, dict[str, Any]] | None:
    """(affine map from pixels to the ground, GeoJSON's ``crs`` member), None without a coordinate system."""
    rasterio = quiet_rasterio()
    try:
        with rasterio.open(path) as file:
            if file.crs is None or file.transform.is_identity:
                return None
            authority = file.crs.to_authority()
            name = f"urn:ogc:def:crs:{authority[0]}::{authority[1]}" if authority else file.crs.to_wkt()
            with open(path, "rb") as stream:
                height, width, orientation = tiff_layout(stream)
            # Boxes are in pixels of the image as it is looked at, the file's transform in those of the file.
            turn = type(file.transform)(*map_to_file(*oriented_size(height, width, orientation), orientation))
            return file.transform @ turn, {"type": "name", "properties": {"name": name}}
    except (rasterio.errors.RasterioError, OSError, ValueError):
        # An image that cannot be read stands in errors.parquet already.
        return None


def _feature(instances: Instances, i: int, transform: Any) -> dict[str, Any]:
    properties = {"instance": i, "score": round(float(instances.scores[i]), 6), "label": int(instances.labels[i])}
    crop = None if instances.masks is None else rle_crop(instances.masks[i])
    if crop is None or not crop.mask.size:
        x1, y1, x2, y2 = (float(v) for v in instances.boxes[i])
        corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
        geometry = {"type": "Polygon", "coordinates": [[_ground(transform, *corner) for corner in corners]]}
    else:
        geometry = _outline(crop, transform)
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def _ground(t: Any, x: float, y: float) -> tuple[float, float]:
    return t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f


def _outline(crop: CropMask, transform: Any) -> dict[str, Any]:
    from rasterio.features import shapes

    t, (x, y) = transform, _ground(transform, crop.left, crop.top)
    moved = type(transform)(t.a, t.b, x, t.d, t.e, y)
    polygons = [shape["coordinates"] for shape, _ in shapes(crop.mask.astype(np.uint8), mask=crop.mask, transform=moved)]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}
