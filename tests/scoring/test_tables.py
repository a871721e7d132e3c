"""Writers are read back; comparison refuses other data."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from models.errors import DataError
from models.geometry.rle import rle_encode
from models.instances import TABLE_COLUMNS, Instances
from pipelines.data.readers.opening import open_dataset
from scoring.comparison.compare import Scored, comparison_table, render
from scoring.reader import Failure
from scoring.writers.coco import write_results
from scoring.writers.parquet import read_instances, write_failures, write_instances

MASK = rle_encode(np.pad(np.ones((4, 6), bool), 3))


def _instances(image_id, masks=True):
    boxes = [[1.25, 2, 9, 9], [0, 0, 3.5, 4]]
    return Instances.make(image_id, 10, 12, boxes, [0.5, 0.75], labels=[0, 0], masks=[MASK, MASK] if masks else None)


@pytest.mark.parametrize("masks", [True, False])
def test_parquet_round_trip(tmp_path, masks):
    path = tmp_path / "t.parquet"
    write_instances([_instances("a", masks), Instances.empty("none", 5, 5), _instances("b ü", masks)], path)
    assert tuple(pq.read_schema(path).names) == TABLE_COLUMNS
    back = read_instances(path)
    assert [b.image_id for b in back] == ["a", "b ü"]
    for one, original in zip(back, (_instances("a", masks), _instances("b ü", masks)), strict=True):
        assert one.boxes.tobytes() == original.boxes.tobytes()
        assert one.scores.tobytes() == original.scores.tobytes()
        assert one.masks == original.masks
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_no_planes_at_all_is_a_valid_table(tmp_path):
    write_instances([], tmp_path / "t.parquet")
    assert read_instances(tmp_path / "t.parquet") == []


def test_tables_of_no_use_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match="not a readable parquet"):
        read_instances(path)
    write_failures([Failure("a", "/a", "damaged", "broken")], path)
    assert pq.read_table(path).to_pylist() == [{"image_id": "a", "path": "/a", "kind": "damaged", "message": "broken"}]
    with pytest.raises(DataError, match="no column 'instance'"):
        read_instances(path)


def test_coco_results_use_the_ids_of_the_source(tmp_path, airfield):
    content = json.loads((airfield / "test_coco.json").read_text())
    for image in content["images"]:
        image["id"] += 500
    for annotation in content["annotations"]:
        annotation["image_id"] += 500
        annotation["category_id"] = 9
    content["categories"] = [{"id": 9, "name": "plane"}]
    (tmp_path / "test_coco.json").write_text(json.dumps(content))
    (tmp_path / "test").symlink_to(airfield / "test")
    data = open_dataset(tmp_path / "test_coco.json")
    sample = data.samples[1]
    instances = Instances.make(sample.image_id, 512, 512, sample.boxes[:1], [0.5], masks=sample.masks[:1])
    write_results([instances], data, tmp_path / "r.json")
    (entry,) = json.loads((tmp_path / "r.json").read_text())
    assert (entry["image_id"], entry["category_id"], entry["file_name"]) == (502, 9, sample.path.name)
    from pycocotools.coco import COCO

    truth = COCO(str(tmp_path / "test_coco.json"))
    assert len(truth.loadRes(str(tmp_path / "r.json")).anns) == 1


def test_a_table_shows_labels_as_they_are_and_what_is_unknown_as_a_dash():
    table = pd.DataFrame(
        {"model": ["007", "1e5"], "AP": [0.12345, math.nan], "images": [12, 1200], "kind": ["boxes", None]}
    )
    rows = [line.split() for line in render(table).splitlines()]
    assert rows[2:] == [["007", "0.123", "12", "boxes"], ["1e5", "-", "1200", "-"]]


def test_comparison_needs_equal_data():
    a, b = (
        Scored("m/1", data="d/test", digest="x", metrics={"AP": 0.5, "AP50": 0.8}, images=4, seconds=2.0),
        Scored("m/2", data="d/test", digest="x", metrics={"AP": 0.6}, images=4, seconds=1.0),
    )
    text = render(comparison_table([a, b]))
    assert "0.500" in text
    assert "m/2" in text
    other = Scored("m/3", data="e/test", digest="y", metrics={"AP": 0.6}, images=4, seconds=1.0)
    with pytest.raises(DataError, match=r"m/3 was scored on e/test \(digest y\), m/1 on d/test"):
        comparison_table([a, other])
