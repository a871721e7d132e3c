"""GeoJSON of georeferenced images, a file each, made from the instance table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.errors import DataError
from models.instances import Instances
from pipelines.data.dataset import Dataset
from pipelines.files import write_text
from scoring.requests import GeoJSON
from scoring.writers.ground import Georeference, geometry, georeference, outline, reprojected, wound
from scoring.writers.walk import file_stem, remove_earlier, side_by_side

LONGITUDE_LATITUDE = "EPSG:4326"
# Of a degree: a tenth of a millimetre.
DIGITS = 9


def write_geojson(predictions: Iterable[Instances], dataset: Dataset, folder: Path, form: GeoJSON = "rfc7946") -> int:
    """Write ``folder/<image id>.geojson`` for each image that has a coordinate system; return how many.

    A plane is the polygon of its mask along the pixels' edges, or its box's corners.

    Args:
        form: ``rfc7946``: longitude and latitude; ``native``: the image's own coordinate system, named in the member
            ``crs``, as GeoJSON had it before and as GIS programs read it.
    """
    written = 0
    remove_earlier(dataset, folder, ".geojson")
    for sample, one in side_by_side(predictions, dataset):
        try:
            place = georeference(sample.path)
        except DataError:
            # The table of errors, or the next job, says what is wrong with it.
            place = None
        if place is None:
            continue
        features = [] if one is None else [_feature(one, i, place, form) for i in range(len(one))]
        content: dict[str, Any] = {"type": "FeatureCollection", "name": sample.image_id, "features": features}
        if form == "native":
            content["crs"] = {"type": "name", "properties": {"name": place.name()}}
        write_text(folder / f"{file_stem(sample.image_id)}.geojson", json.dumps(content))
        written += 1
    return written


def _feature(instances: Instances, i: int, place: Georeference, form: GeoJSON) -> dict[str, Any]:
    properties = {"instance": i, "score": round(float(instances.scores[i]), 6), "label": int(instances.labels[i])}
    polygons = outline(instances, i, place.transform)
    if form == "rfc7946":
        polygons = wound(reprojected(polygons, place.crs, LONGITUDE_LATITUDE))
        polygons = [[ring.round(DIGITS) for ring in rings] for rings in polygons]
    return {"type": "Feature", "properties": properties, "geometry": geometry(polygons)}
