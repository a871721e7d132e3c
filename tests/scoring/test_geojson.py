"""GeoJSON in the image's coordinate system: what GDAL reads back lies where the planes lie."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models.geometry.rle import rle_encode
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from scoring.writers.geojson import write_geojson
from tests.conftest import write_image

rasterio = pytest.importorskip("rasterio")


@pytest.fixture
def dataset(tmp_path):
    """One TIFF in UTM 33 with pixels of half a metre, one PNG, one TIFF without a place."""
    from rasterio.transform import from_origin

    placed = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_700_000, 0.5, 0.5)}
    for name, where in (("placed", placed), ("bare", {})):
        profile = {"driver": "GTiff", "count": 3, "height": 40, "width": 50, "dtype": "uint8", "photometric": "RGB"}
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile, **where) as file:
            file.write(np.zeros((3, 40, 50), np.uint8))
    write_image(tmp_path / "photo.png")
    dataset = open_dataset(tmp_path)
    assert [s.image_id for s in dataset.samples] == ["bare", "photo", "placed"]
    return dataset


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_masks_and_boxes_in_ground_coordinates(dataset, tmp_path):
    from rasterio.features import rasterize
    from rasterio.transform import from_origin

    ring = np.zeros((40, 50), bool)
    ring[5:20, 10:30] = True
    ring[9:13, 14:22] = False
    ring[30:33, 40:44] = True
    instances = Instances.make("placed", 40, 50, [[10, 5, 44, 33]], [0.75], masks=[rle_encode(ring)])
    boxes = Instances.make("placed", 40, 50, [[10, 4, 20, 8], [1, 2, 3, 4]], [0.9, 0.5])
    assert (
        write_geojson([instances.named("bare"), instances.named("photo"), instances], dataset, tmp_path / "g", "native")
        == 1
    )
    assert [p.name for p in (tmp_path / "g").iterdir()] == ["placed.geojson"]
    content = json.loads((tmp_path / "g" / "placed.geojson").read_text())
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    feature = content["features"][0]
    assert feature["properties"] == {"instance": 0, "score": 0.75, "label": 0}
    # Drawn back onto the grid, the polygons with their hole are the mask again.
    drawn = rasterize([feature["geometry"]], (40, 50), transform=from_origin(500_000, 5_700_000, 0.5, 0.5))
    assert (drawn.astype(bool) == ring).all()

    write_geojson([boxes], dataset, tmp_path / "g", "native")
    first = json.loads((tmp_path / "g" / "placed.geojson").read_text())["features"][0]["geometry"]
    assert first["type"] == "Polygon"
    corners = np.array(first["coordinates"][0])
    assert corners.min(axis=0).tolist() == [500_005, 5_699_996]
    assert corners.max(axis=0).tolist() == [500_010, 5_699_998]
    write_geojson([], dataset, tmp_path / "g")
    assert json.loads((tmp_path / "g" / "placed.geojson").read_text())["features"] == []


def test_longitude_and_latitude_as_rfc_7946_asks(dataset, tmp_path):
    from pyproj import Transformer

    ring = np.zeros((40, 50), bool)
    ring[5:20, 10:30] = True
    ring[9:13, 14:22] = False
    instances = Instances.make("placed", 40, 50, [[10, 5, 30, 20]], [0.75], masks=[rle_encode(ring)])
    write_geojson([instances], dataset, tmp_path)
    content = json.loads((tmp_path / "placed.geojson").read_text())
    assert "crs" not in content
    outer, hole = content["features"][0]["geometry"]["coordinates"]
    # PROJ itself, on the corners of the pixels.
    corners = [(500_000 + x / 2, 5_700_000 - y / 2) for x, y in ((10, 5), (10, 20), (30, 20), (30, 5))]
    expected = {Transformer.from_crs(32633, 4326, always_xy=True).transform(*c) for c in corners}
    assert len(outer) == 5
    assert all(min(np.hypot(x - a, y - b) for a, b in expected) < 2e-9 for x, y in outer)
    for points, sign in ((outer, 1), (hole, -1)):
        x, y = (np.array(points) - points[0]).T
        assert np.sign(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) == sign
    assert 15 - 1e-4 < outer[0][0] < 15.01
    assert 51.4 < outer[0][1] < 51.5


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_tiff_lies_where_its_pixels_lie(orientation, tmp_path):
    from rasterio.features import rasterize
    from rasterio.transform import from_origin

    from models.images.decoding import read_image
    from tests.models.test_rasters import PLANE, rotated, scene

    place = from_origin(500_000, 5_700_000, 0.5, 0.5)
    (tmp_path / "in").mkdir()
    rotated(tmp_path / "in" / "a.tif", scene(90, 230, 0, "uint8", 1), orientation, crs="EPSG:32633", transform=place)
    with rasterio.open(tmp_path / "in" / "a.tif") as file:
        stored = file.read(1)
    assert (read_image(tmp_path / "in" / "a.tif")[:, :, 0] == np.where(PLANE, 230, 90)).all()
    instances = Instances.make("a", *PLANE.shape, [[0, 0, 1, 1]], [0.9], masks=[rle_encode(PLANE)])
    write_geojson([instances], open_dataset(tmp_path / "in"), tmp_path / "g", "native")
    feature = json.loads((tmp_path / "g" / "a.geojson").read_text())["features"][0]
    assert (rasterize([feature["geometry"]], stored.shape, transform=place).astype(bool) == (stored == 230)).all()
