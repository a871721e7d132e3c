"""One map layer of a job's images: where planes lie, and each of them once where scenes overlap."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from click.testing import CliRunner

from models.errors import DataError
from models.geometry.rle import rle_encode
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from scoring.cli import main
from scoring.jobs.job import run_job
from scoring.requests import JobSettings, LayerSettings
from scoring.writers.layer import planes_seen_once, write_layers
from tests.conftest import write_image

rasterio = pytest.importorskip("rasterio")
geopandas = pytest.importorskip("geopandas")
shapely = pytest.importorskip("shapely")

SIDE = 900


def _scene(path, transform, crs="EPSG:32633", time=None):
    profile = {"driver": "GTiff", "count": 3, "height": SIDE, "width": SIDE, "dtype": "uint8", "photometric": "RGB"}
    path.parent.mkdir(exist_ok=True)
    with rasterio.open(path, "w", crs=crs, transform=transform, **profile) as file:
        file.write(np.zeros((3, SIDE, SIDE), np.uint8))
        if time:
            file.update_tags(TIFFTAG_DATETIME=time)


def _planes(count):
    """Crosses on the ground, metres: no two of them touch, some are close."""
    chance = np.random.default_rng(5)
    planes = []
    while len(planes) < count:
        x, y, turn, size = *chance.uniform(0, 640, 2), chance.uniform(0, math.tau), chance.uniform(6, 14)
        body = shapely.box(-size / 2, -size / 8, size / 2, size / 8)
        wings = shapely.box(-size / 8, -size / 2.2, size / 8, size / 2.2)
        shape = shapely.affinity.rotate(shapely.union(body, wings), turn, use_radians=True, origin=(0, 0))
        shape = shapely.affinity.translate(shape, 500_000 + x, 5_699_400 + y)
        if all(shape.distance(other) > 0.7 for other in planes):
            planes.append(shape)
    return planes


def _detected(image_id, planes, transform, masks, chance):
    """What a perfect detector says of a scene, in its own pixels; the planes that it shows."""
    from rasterio.features import rasterize

    frame = shapely.box(0, 0, SIDE, SIDE)
    back = ~transform
    shown, boxes, outlines = [], [], []
    for number, plane in enumerate(planes):
        seen = shapely.affinity.affine_transform(plane, (back.a, back.b, back.d, back.e, back.c, back.f)) & frame
        if seen.area < 12:
            continue
        drawn = rasterize([seen], (SIDE, SIDE), fill=0, default_value=1).astype(bool)
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        if not len(rows):
            continue
        shown.append(number)
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        outlines.append(rle_encode(drawn))
    scores = chance.uniform(0.3, 1, len(boxes))
    return Instances.make(image_id, SIDE, SIDE, boxes, scores, masks=outlines if masks else None), shown


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Two scenes that share half of their ground, the second one turned by 20 degrees and of larger pixels."""
    from rasterio.transform import Affine, from_origin

    folder = tmp_path_factory.mktemp("survey")
    a = from_origin(500_000, 5_700_000, 0.45, 0.45)
    b = Affine.translation(500_230, 5_700_020) @ Affine.rotation(-20) @ Affine.scale(0.55, -0.55)
    _scene(folder / "in" / "a.tif", a, time="2026:05:04 10:11:12")
    _scene(folder / "in" / "b.tif", b, time="2026:05:04 10:11:12")
    planes = _planes(720)
    chance = np.random.default_rng(6)
    made = {}
    for masks in (True, False):
        found, shown = zip(*(_detected(name, planes, t, masks, chance) for name, t in (("a", a), ("b", b))), strict=True)
        made[masks] = found
    return folder / "in", planes, made, shown


@pytest.mark.parametrize("masks", [True, False])
def test_each_of_500_planes_in_two_overlapping_scenes_is_there_once(survey, tmp_path, masks):
    folder, planes, made, shown = survey
    both, either = set(shown[0]) & set(shown[1]), set(shown[0]) | set(shown[1])
    # Enough are seen twice, and enough are cut by a border, for the test to mean something.
    assert len(both) > 150
    assert len(either) > 500
    dataset = open_dataset(folder)
    twice = write_layers(made[masks], dataset, tmp_path, ["geopackage"], version="planes-det/3", settings=LayerSettings())
    assert twice == len(shown[0]) + len(shown[1])
    once = LayerSettings(dedupe=True, crs="EPSG:32633")
    rows = write_layers(made[masks], dataset, tmp_path, ["geopackage", "geoparquet"], version="planes-det/3", settings=once)
    assert rows == len(either)
    layer = geopandas.read_file(tmp_path / "planes.gpkg", engine="pyogrio")
    assert (layer["seen"] == 2).sum() == len(both)
    assert layer.crs.to_epsg() == 32633
    # Every plane has one row whose outline lies on it, most of it where the plane is not cut.
    hits = [
        [i for i, outline in enumerate(layer.geometry) if outline.intersection(planes[n]).area > 2] for n in sorted(either)
    ]
    if masks:
        assert sorted(i for one in hits for i in one) == list(range(rows))
        truth = [planes[n] for n in sorted(both)]
        best = [max(o.intersection(t).area / t.area for o in layer.geometry) for t in truth]
        assert min(best) > 0.5
    assert all(hits)
    parquet = geopandas.read_parquet(tmp_path / "planes.parquet")
    assert parquet.geometry.geom_equals(layer.geometry).all()
    assert list(parquet.columns) == ["image", "time", "version", "instance", "score", "label", "seen", "geometry"]
    assert set(parquet["time"]) == {"2026:05:04 10:11:12"}
    assert set(parquet["version"]) == {"planes-det/3"}


def test_images_of_different_times_show_different_planes(survey, tmp_path):
    folder, _, made, shown = survey
    settings = LayerSettings(dedupe=True, time_pattern="^(.)")
    rows = write_layers(made[False], open_dataset(folder), tmp_path, ["geopackage"], version="m/1", settings=settings)
    assert rows == len(shown[0]) + len(shown[1])
    assert set(geopandas.read_file(tmp_path / "planes.gpkg")["time"]) == {"a", "b"}


def test_scenes_of_two_zones_meet_in_longitude_and_latitude(tmp_path):
    """The same square on the ground, seen from UTM zones 32 and 33, near their border at 12 degrees east."""
    from pyproj import Transformer
    from rasterio.transform import from_origin

    corner = (11.9995, 51.5)
    found = []
    for zone in (32632, 32633):
        x, y = Transformer.from_crs(4326, zone, always_xy=True).transform(*corner)
        _scene(tmp_path / "in" / f"{zone}.tif", from_origin(x - 100, y + 100, 0.5, 0.5), f"EPSG:{zone}")
        found.append(Instances.make(str(zone), SIDE, SIDE, [[200, 200, 260, 260]], [0.5 + zone / 100_000]))
    settings = LayerSettings(dedupe=True)
    assert (
        write_layers(found, open_dataset(tmp_path / "in"), tmp_path, ["geoparquet"], version="m/1", settings=settings) == 1
    )
    layer = geopandas.read_parquet(tmp_path / "planes.parquet")
    assert layer.crs.to_epsg() == 4326
    assert layer["image"].tolist() == ["32633"]
    x1, _, x2, y2 = layer.total_bounds
    assert x1 == pytest.approx(corner[0], abs=2e-5)
    assert y2 == pytest.approx(corner[1], abs=2e-5)
    assert (x2 - x1) * math.cos(math.radians(51.5)) * 111_320 == pytest.approx(30, rel=0.05)


def _once(boxes, images, scores, cut=None, times=None):
    shapes = [shapely.box(*box) for box in boxes]
    times = times or [""] * len(boxes)
    return planes_seen_once(shapes, images, times, scores=scores, cut=cut or [False] * len(boxes))


def test_neighbours_and_cut_planes():
    # Of one image, however much they overlap: two planes.
    assert _once([(0, 0, 10, 10), (0, 0, 10, 11)], ["a", "a"], [0.5, 0.9]) == ([0, 1], [1, 1])
    # Of two images: the surer one stays.
    assert _once([(0, 0, 10, 10), (0, 0, 10, 11)], ["a", "b"], [0.5, 0.9]) == ([1], [2])
    # Half of it, cut by a border: the whole one stays, whatever its score.
    halves = [(0, 0, 10, 10), (0, 0, 4, 10)]
    assert _once(halves, ["a", "b"], [0.5, 0.9], cut=[False, True]) == ([0], [2])
    assert _once(halves, ["a", "b"], [0.5, 0.9]) == ([0, 1], [1, 1])
    # Two small ones on a large one of another image: it takes one of them only.
    two = [(0, 0, 10, 10), (0, 0, 6, 10), (6, 0, 10, 10)]
    assert _once(two, ["a", "b", "b"], [0.9, 0.5, 0.5], cut=[True, False, False]) == ([1, 2], [2, 1])
    # Of another class, or time.
    assert _once([(0, 0, 10, 10), (0, 0, 10, 11)], ["a", "b"], [0.5, 0.9], times=["0 x", "1 x"]) == ([0, 1], [1, 1])
    # Three images, one plane.
    assert _once([(0, 0, 10, 10)] * 3, ["a", "b", "c"], [0.1, 0.3, 0.2]) == ([1], [3])
    assert _once([], [], []) == ([], [])
    # A polygon that touches itself.
    bow = shapely.Polygon([(0, 0), (5, 5), (10, 0), (10, 10), (5, 5), (0, 10)])
    assert planes_seen_once([bow, bow], ["a", "b"], ["", ""], scores=[0.2, 0.1], cut=[False, False])[0] == [0]


class One:
    """A plane in every image."""

    def predict(self, images):
        return [Instances.make("", *image.shape[:2], [[5, 6, 20, 30]], [0.75]) for image in images]


def test_through_the_command(tmp_path):
    from rasterio.transform import from_origin

    for i in range(2):
        _scene(tmp_path / "in" / f"s{i}_20260504.tif", from_origin(500_000 + i, 5_700_000, 0.5, 0.5))
    write_image(tmp_path / "in" / "photo.png")
    settings = JobSettings(shard_size=2, overlays=0)
    job = run_job(
        One(), "planes-det/3", open_dataset(tmp_path / "in"), tmp_path, settings=settings, progress=lambda r, *_: r
    )
    more = ["--crs", "EPSG:3857", "--dedupe", "--time-pattern", r"_(\d{8})$"]
    done = CliRunner().invoke(main, ["export", str(job.folder), "--to", "geopackage,geoparquet", *more])
    assert done.exit_code == 0, done.output
    layer = geopandas.read_file(job.folder / "planes.gpkg")
    assert (len(layer), layer.crs.to_epsg(), layer["seen"].tolist(), layer["time"].tolist()) == (1, 3857, [2], ["20260504"])
    native = CliRunner().invoke(main, ["export", str(job.folder), "--to", "geojson", "--geojson", "native"])
    assert native.exit_code == 0, native.output
    assert re.search('"crs"', (job.folder / "geojson" / "s0_20260504.geojson").read_text())
    # Neither is a file that a job leaves itself.
    assert not list(job.folder.glob(".planes*"))


def test_planes_across_the_antimeridian_stay_where_they_are(tmp_path):
    from rasterio.transform import from_origin

    # In zone 60 180 degrees east lie some 834 km east of its edge; the scene begins just before.
    _scene(tmp_path / "in" / "fiji.tif", from_origin(833_950, 10_000_000, 0.5, 0.5), "EPSG:32760")
    _scene(tmp_path / "in" / "west.tif", from_origin(300_000, 10_000_000, 0.5, 0.5), "EPSG:32760")
    found = [
        Instances.make("fiji", SIDE, SIDE, [[0, 300, 700, 400]], [0.9]),
        Instances.make("west", SIDE, SIDE, [[200, 300, 260, 360]], [0.7]),
    ]
    dataset = open_dataset(tmp_path / "in")
    rows = write_layers(found, dataset, tmp_path, ["geoparquet"], version="m/1", settings=LayerSettings(dedupe=True))
    assert rows == 2
    bounds = geopandas.read_parquet(tmp_path / "planes.parquet").geometry.bounds
    assert (bounds["maxx"] - bounds["minx"]).max() < 0.01
    assert bounds["maxx"].max() > 180


def test_a_scene_with_planes_that_cannot_be_read_any_more_is_said(tmp_path):
    from rasterio.transform import from_origin

    for name in ("a", "b"):
        _scene(tmp_path / "in" / f"{name}.tif", from_origin(500_000, 5_700_000, 0.5, 0.5))
    dataset = open_dataset(tmp_path / "in")
    (tmp_path / "in" / "b.tif").unlink()
    found = [Instances.make(name, SIDE, SIDE, [[9, 9, 20, 20]], [0.9]) for name in ("a", "b")]
    write_layers(found[:1], dataset, tmp_path, ["geopackage"], version="m/1", settings=LayerSettings())
    with pytest.raises(DataError, match=r"b\.tif: cannot be read, so that its place is not known"):
        write_layers(found, dataset, tmp_path, ["geopackage"], version="m/1", settings=LayerSettings())


def test_what_cannot_be_put_on_a_map(tmp_path):
    write_image(tmp_path / "in" / "photo.png")
    dataset = open_dataset(tmp_path / "in")
    with pytest.raises(DataError, match="none of 1 images has a coordinate system"):
        write_layers([], dataset, tmp_path, ["geopackage"], version="m/1", settings=LayerSettings())
    with pytest.raises(DataError, match="--crs EPSG:1: no coordinate system"):
        write_layers([], dataset, tmp_path, ["geopackage"], version="m/1", settings=LayerSettings(crs="EPSG:1"))
    with pytest.raises(DataError, match="--crs EPSG:5703: is neither geographic nor projected"):
        write_layers([], dataset, tmp_path, ["geopackage"], version="m/1", settings=LayerSettings(crs="EPSG:5703"))
    from rasterio.transform import from_origin

    _scene(tmp_path / "in" / "a.tif", from_origin(500_000, 5_700_000, 0.5, 0.5))
    dataset = open_dataset(tmp_path / "in")
    with pytest.raises(DataError, match=r"--time-pattern '\(': is no regular expression"):
        found = [Instances.make("a", SIDE, SIDE, [[0, 0, 9, 9]], [0.5])]
        write_layers(found, dataset, tmp_path, ["geopackage"], version="m/1", settings=LayerSettings(time_pattern="("))
    # A place without planes is an empty layer.
    assert write_layers([], dataset, tmp_path, ["geopackage"], version="m/1", settings=LayerSettings(dedupe=True)) == 0
    assert len(geopandas.read_file(tmp_path / "planes.gpkg")) == 0
