"""Training on tiles and scoring by tiles through the commands; large georeferenced files."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.saved.spec import read_spec
from tests.conftest import write_image
from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("journey")

TILES = ("window=null", "tiles.size=128", "tiles.overlap=0.4", "training.batch_size=2", "training.evaluate_every=4")
# So little training proposes boxes everywhere.
FEW = ("architecture.proposals_before_nms=100", "architecture.proposals=40", "architecture.max_detections=20")


@pytest.fixture(scope="module")
def tiled(project):
    """planes-tiled/1, trained for 4 steps on cached tiles of 128 pixels."""
    done = project.step(
        "train_detector",
        "--data",
        str(project.data),
        "--name",
        "planes-tiled",
        "--steps",
        "4",
        "--set",
        " ".join((*TILES, *FEW, "tiles.cached=true", "architecture.score_threshold=0.0")),
    )
    return project, done


def _params(project, done):
    return project.client.get_run(re.search(r"run ([0-9a-f]{32})", done.stdout)[1]).data.params


def test_training_on_tiles_is_logged_and_its_tiling_travels(tiled):
    project, done = tiled
    said = re.search(r"(\d+) images, (\d+) planes.* in tiles of 128 pixels, (\d+) of them empty", done.stdout)
    assert said
    run = project.client.get_run(re.search(r"run ([0-9a-f]{32})", done.stdout)[1])
    assert run.data.metrics["training_tiles"] == int(said[1])
    assert run.data.params["tiles.overlap"] == "0.4"
    folder = next((project.folder / ".planes" / "training").glob("planes-tiled-*/model"))
    assert read_spec(folder).tiling.size == 128
    assert read_spec(folder).tiling.overlap == 0.4
    cached = list((project.folder / ".planes" / "training").glob("tiles-*/*.png"))
    assert len(cached) == int(said[1])


def test_the_versions_tiles_are_used_and_the_batch_changes_no_row(tiled):
    project, _ = tiled
    tables = []
    for batch in ("auto", "5"):
        done = project.score(
            "--model",
            "planes-tiled/1",
            "--data",
            str(project.data),
            "--overlays",
            "0",
            "--out",
            f"b{batch}",
            "--batch",
            batch,
            "--score-threshold",
            "0.3",
        )
        used = json.loads(_params(project, done)["tiling"])
        assert (used["size"], used["batch"]) == (128, None if batch == "auto" else 5)
        tables.append(pq.read_table(project.folder / f"b{batch}" / "planes-tiled-1" / "instances.parquet").to_pandas())
    assert len(tables[0]) == len(tables[1]) > 0
    assert list(tables[0].image_id) == list(tables[1].image_id)
    numbers = ["x1", "y1", "x2", "y2", "score"]
    assert np.allclose(tables[0][numbers], tables[1][numbers], atol=1e-2)


def test_other_tiles_can_be_given(tiled):
    project, _ = tiled
    done = project.score(
        "--model",
        "planes-tiled/1",
        "--data",
        str(project.data),
        "--overlays",
        "0",
        "--out",
        "t2",
        "--tile",
        "200",
        "--merge",
        "nms",
        "--merge-threshold",
        "0.4",
        "--full-image",
        "256",
        "--turns",
        "2",
        "--batch",
        "3",
    )
    changed = json.loads(_params(project, done)["tiling"])
    assert changed == {
        "size": 200,
        "overlap": 0.4,
        "merge": "nms",
        "match": "iou",
        "threshold": 0.4,
        "full_image_size": 256,
        "batch": 3,
        "zooms": [1.0],
        "zoom_weights": None,
        "turns": 2,
    }
    refused = project.score("--model", "planes-unet/1", "--data", str(project.data), "--tile", "128", code=1)
    assert "segments planes in given boxes" in error_line(refused)


def test_a_large_geotiff_is_scored_by_windows(tiled, tmp_path):
    """110 million pixels, most of them without imagery: one plane scene in a corner, one across the middle."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    from models.images.decoding import read_image

    project, _ = tiled
    scene = read_image(project.data / "test" / "A0005.png")
    side = 10_500
    profile = {"driver": "GTiff", "count": 3, "height": side, "width": side, "dtype": "uint8", "photometric": "RGB"}
    blocks = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "sparse_ok": True}
    where = {"crs": "EPSG:25832", "transform": from_origin(300_000, 5_500_000, 0.25, 0.25)}
    data = tmp_path / "mosaic"
    data.mkdir()
    with rasterio.open(data / "big.tif", "w", **profile, **blocks, **where) as file:
        for top, left in ((0, 0), (5000, 4700)):
            file.write(scene.transpose(2, 0, 1), window=((top, top + 512), (left, left + 512)))
    shutil.copy(project.data / "test" / "A0005.png", data / "small.png")
    write_image(data / "other.png", 130, 140)
    done = project.score(
        "--model", "planes-tiled/1", "--data", str(data), "--out", str(tmp_path / "o"), "--score-threshold", "0.3"
    )
    folder = tmp_path / "o" / "planes-tiled-1"
    assert "in 3 images" in done.stdout
    content = json.loads((folder / "geojson" / "big.geojson").read_text())
    # 300 km east in zone 32, which has 9 degrees in its middle, is some 6 degrees.
    assert all(6 < x < 6.4 and 49 < y < 50 for f in content["features"] for x, y in f["geometry"]["coordinates"][0])
    table = pq.read_table(folder / "instances.parquet").to_pandas()
    big, small = table[table.image_id == "big"], table[table.image_id == "small"]
    assert len(content["features"]) == len(big)
    # The corner shows what the scene alone shows: padding changes nothing.
    corner = big[(big.x2 < 512) & (big.y2 < 512)]
    inner = small[(small.x2 < 500) & (small.y2 < 500)]
    assert len(inner) > 0
    for _, row in inner.iterrows():
        near = corner[["x1", "y1", "x2", "y2"]].sub(row[["x1", "y1", "x2", "y2"]]).abs().max(axis=1)
        assert near.min() < 0.01
    overlay = read_image(folder / "overlays" / "big.jpg")
    assert overlay.shape == (4096, 4096, 3)
