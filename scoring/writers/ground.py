"""Planes on the ground: where a georeferenced image lies, and the outline of a plane in its coordinate system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from models.errors import DataError, PlanesError, one_line
from models.geometry.rle import rle_crop
from models.images.raster import opened_tiff
from models.images.remote_bytes import RemoteBytes
from models.images.rendering import map_to_file, oriented_size
from models.images.windows import WINDOWED_SUFFIXES
from models.instances import Instances
from pipelines.data.remote import AnyPath

# Polygons of one plane: each a list of rings, the outer one first, each ring (K, 2) float64, x and y, closed.
Polygons = list[list[np.ndarray]]
# Where a TIFF says when it was taken.
TIME_TAG = "TIFFTAG_DATETIME"


@dataclass(frozen=True)
class Georeference:
    """Where an image lies.

    Attributes:
        transform: affine map from pixels of the image, as it is looked at, to its coordinate system.
        crs: rasterio's coordinate system.
        time: the text of the file's time tag, empty without one.
    """

    transform: Any
    crs: Any
    time: str

    def name(self) -> str:
        """The coordinate system for a GeoJSON's member ``crs``: an OGC URN, or WKT where it has no number."""
        authority = self.crs.to_authority()
        return f"urn:ogc:def:crs:{authority[0]}::{authority[1]}" if authority else str(self.crs.to_wkt())


def georeference(path: AnyPath) -> Georeference | None:
    """Where an image lies; None without a coordinate system.

    Raises:
        DataError: its file cannot be read.
    """
    if not urlsplit(str(path)).path.lower().endswith(WINDOWED_SUFFIXES):
        return None
    try:
        with opened_tiff(path if isinstance(path, Path) else RemoteBytes(path)) as (file, layout):
            if file.crs is None or file.transform.is_identity:
                return None
            height, width, orientation = layout
            # Boxes are in pixels of the image as it is looked at, the file's transform in those of the file.
            turn = type(file.transform)(*map_to_file(*oriented_size(height, width, orientation), orientation))
            return Georeference(file.transform @ turn, file.crs, file.tags().get(TIME_TAG, "").strip())
    except (PlanesError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, so that its place is not known ({one_line(error, 160)})") from error


def outline(instances: Instances, i: int, transform: Any) -> Polygons:
    """A plane on the ground: its mask along the pixels' edges, or its box's corners where it has none."""
    crop = None if instances.masks is None else rle_crop(instances.masks[i])
    if crop is None or not crop.mask.size:
        x1, y1, x2, y2 = (float(v) for v in instances.boxes[i])
        return [[_placed(np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]), transform)]]
    from rasterio.features import shapes

    corner = np.array([crop.left, crop.top], float)
    pieces = (shape["coordinates"] for shape, _ in shapes(crop.mask.astype(np.uint8), mask=crop.mask))
    return [[_placed(np.array(ring) + corner, transform) for ring in rings] for rings in pieces]


def _placed(points: np.ndarray, t: Any) -> np.ndarray:
    x, y = points[:, 0], points[:, 1]
    return np.stack([t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f], axis=1)


def reprojected(polygons: Polygons, source: Any, target: str) -> Polygons:
    """The same polygons in another coordinate system, such as ``EPSG:4326``, whose first coordinate is longitude.

    One across the antimeridian has longitudes above 180 degrees.

    Raises:
        rasterio.errors.CRSError: no such system.
    """
    from rasterio.crs import CRS
    from rasterio.warp import transform

    def moved(ring: np.ndarray) -> np.ndarray:
        placed = np.stack(transform(source, target, ring[:, 0], ring[:, 1]), axis=1)
        if geographic and np.ptp(placed[:, 0]) > 180:
            # Across the antimeridian: beyond 180 degrees east, where it would go around the world.
            placed[placed[:, 0] < 0, 0] += 360
        return placed

    geographic = CRS.from_user_input(target).is_geographic

    return [[moved(ring) for ring in rings] for rings in polygons]


def wound(polygons: Polygons) -> Polygons:
    """Outer rings counterclockwise and holes clockwise, as RFC 7946 asks, in coordinates that grow right and up."""

    def turned(ring: np.ndarray, left: bool) -> np.ndarray:
        x, y = ring[:, 0] - ring[0, 0], ring[:, 1] - ring[0, 1]
        area = float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
        return ring if (area > 0) == left else ring[::-1]

    return [[turned(ring, left=k == 0) for k, ring in enumerate(rings)] for rings in polygons]


def geometry(polygons: Polygons) -> dict[str, Any]:
    """GeoJSON's geometry: a Polygon, or a MultiPolygon of several."""
    listed = [[ring.tolist() for ring in rings] for rings in polygons]
    if len(listed) == 1:
        return {"type": "Polygon", "coordinates": listed[0]}
    return {"type": "MultiPolygon", "coordinates": listed}
