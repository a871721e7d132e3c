"""STAC items as data: which asset is taken, where it lies, and what cannot be used."""

from __future__ import annotations

import json

import pytest

from models.errors import DataError
from pipelines.data.readers.opening import open_dataset
from tests.conftest import write_image

TIFF = "image/tiff; application=geotiff; profile=cloud-optimized"


def _item(name, **assets):
    item = {"type": "Feature", "stac_version": "1.1.0", "id": name, "geometry": None, "links": []}
    return {**item, "properties": {"datetime": "2026-05-04T10:11:12Z"}, "assets": assets}


def _written(tmp_path, content):
    (tmp_path / "items.json").write_text(json.dumps(content))
    return tmp_path / "items.json"


def test_the_picture_of_each_item_is_taken(tmp_path):
    image = write_image(tmp_path / "tiles" / "a.png")
    thumb = {"href": "thumb.png", "roles": ["thumbnail"], "type": "image/png"}
    items = [
        _item("a", thumbnail=thumb, data={"href": "x.tif", "roles": ["data"]}, visual={"href": "./tiles/a.png"}),
        _item(
            "b", thumbnail=thumb, B02={"href": "b02.tif", "type": TIFF}, tci={"href": "s3://x/b.tif", "roles": ["visual"]}
        ),
        _item(
            "c", meta={"href": "c.xml", "roles": ["data"]}, B02={"href": "https://x.org/c", "type": TIFF, "roles": ["data"]}
        ),
        _item("d", one={"href": "/far/d.jp2", "type": "IMAGE/JP2"}, preview={"href": "d.png", "roles": ["overview"]}),
        _item("e", visual={"href": "https://x.org/e.tif?sig=a.b"}, B02={"href": "b.tif", "type": TIFF, "roles": ["data"]}),
    ]
    dataset = open_dataset(_written(tmp_path, {"type": "FeatureCollection", "features": items}))
    assert [s.image_id for s in dataset.samples] == ["a", "b", "c", "d", "e"]
    places = [str(s.path) for s in dataset.samples]
    assert places == [
        str(tmp_path / "tiles" / "a.png"),
        "s3://x/b.tif",
        "https://x.org/c",
        "/far/d.jp2",
        "https://x.org/e.tif?sig=a.b",
    ]
    assert (dataset.samples[0].read() == image).all()
    assert not dataset.has_truth
    single = open_dataset(_written(tmp_path, items[0]))
    assert [s.image_id for s in single.samples] == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_item("a", meta={"href": "a.xml"}), r"items.json: item 'a' has no asset that is a picture; it has: meta"),
        (_item("a"), "it has: none"),
        (
            _item("a", x={"href": "x.png"}, y={"href": "y.png"}),
            "several assets that are pictures, none called visual; it has: x, y",
        ),
        (_item("a", x={"href": "x.tif", "roles": ["data"]}, y={"href": "y.tif", "roles": ["data"]}), "role data, .*: x, y"),
        (
            {**_item("a", visual={"href": "a.png"}), "links": [{"rel": "next", "href": "?page=2"}]},
            "one page of a longer list",
        ),
        (_item(""), "an item without an id"),
        (
            {"type": "FeatureCollection", "features": [_item("a", v={"href": "a.png"})] * 2},
            "image 'a' appears 2 times|'a.png'",
        ),
        ({"type": "FeatureCollection", "features": []}, "nor STAC items"),
        ({"type": "FeatureCollection", "features": [{"id": "a"}]}, "nor STAC items"),
    ],
)
def test_what_is_no_item_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        open_dataset(_written(tmp_path, content))
