"""Masks that end early are refused by every reader, by name; none decodes to what the memory holds."""

from __future__ import annotations

import base64
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from models.errors import DataError
from models.geometry.rle import rle_encode
from models.instances import Instances, to_rows
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.side_by_side import measure
from pipelines.registry.verification import Example
from scoring.jobs.export import export_job
from scoring.writers.kaggle import HEADER, decode_mask, encode_mask, read_submission
from scoring.writers.parquet import SCHEMA, InstanceTable, read_instances, write_instances
from tests.scoring.test_failed_images import Finder, _score, _set

RLE = rle_encode(np.random.default_rng(0).random((60, 80)) > 0.5)
SHORT = {**RLE, "counts": RLE["counts"][:-40]}
LONG = {**RLE, "counts": RLE["counts"] + RLE["counts"][:10]}
DAMAGED = [SHORT, LONG, {**RLE, "counts": RLE["counts"][:5]}, {**RLE, "size": [80, 60]}, {**RLE, "counts": "é"}]


def _predictions():
    return Instances.make("a", 60, 80, [[1, 1, 9, 9]] * 2, [0.9, 0.8], masks=[RLE, RLE])


def _write_table(path, rle):
    """An instance table whose second mask is damaged; `Instances` itself takes no mask of another size."""
    rows = to_rows([_predictions()])
    rows[1] |= {"mask_size": rle["size"], "mask_counts": rle["counts"]}
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


@pytest.mark.parametrize("rle", DAMAGED)
@pytest.mark.parametrize("course", [False, True])
def test_annotations(tmp_path, rle, course):
    folder = _set(tmp_path, 1)
    content = json.loads((folder / "test_coco.json").read_text())
    content["annotations"][0]["segmentation"] = rle
    if course:
        entry = {**content["annotations"][0], "file_name": "0.png", "category_name": "plane"}
        (folder / "test_coco.json").unlink()
        (folder / "test.json").write_text(json.dumps([entry]))
    else:
        (folder / "test_coco.json").write_text(json.dumps(content))
    if course and rle["size"] == [80, 60]:
        # The outline is all that states a size there.
        with pytest.raises(DataError, match="1 images of another size left out"):
            open_dataset(folder, "test")
        return
    data = open_dataset(folder, "test")
    assert (data.planes, data.samples[0].masks) == (1, (None,))
    assert "1 unusable outlines dropped (first: " in data.problems.summary()


@pytest.mark.parametrize("rle", DAMAGED)
def test_instance_tables(tmp_path, rle):
    path = tmp_path / "instances.parquet"
    write_instances([_predictions()], path)
    assert read_instances(path) == [_predictions()]
    _write_table(path, rle)
    for read in (read_instances, lambda path: list(InstanceTable(path))):
        with pytest.raises(DataError, match=r"instances\.parquet: image 'a', mask 1: .*; score it anew"):
            read(path)


@pytest.mark.parametrize(
    ("column", "value"), [("mask_size", None), ("mask_counts", None), ("mask_size", [60]), ("x1", None)]
)
def test_rows_that_are_no_planes(tmp_path, column, value):
    path = tmp_path / "instances.parquet"
    write_instances([_predictions()], path)
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1][column] = value
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    if column == "x1":
        assert np.isnan(read_instances(path)[0].boxes[1, 0])
        return
    with pytest.raises(DataError, match=r"instances\.parquet: (its rows cannot be read|some planes|image 'a', mask 1)"):
        read_instances(path)


def test_a_job_whose_table_is_damaged_is_not_exported(tmp_path):
    job = _score(_set(tmp_path / "data"), tmp_path / "out", Finder())
    table = pq.read_table(job.folder / "instances.parquet")
    rows = table.to_pylist()
    rows[2]["mask_counts"] = rows[2]["mask_counts"][:-1]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), job.folder / "instances.parquet")
    with pytest.raises(DataError, match="image '2', mask 0: its runs"):
        export_job(job.folder, tmp_path / "later", ["coco"])


@pytest.mark.parametrize(
    "text",
    [
        "0 4801",
        "4800 2",
        "-1 5",
        "5 0",
        "9 3 4 2",
        "1 2 3",
        "4611686018427387904 4611686018427387904",
        "9223372036854775807 1",
        "1 9223372036854775807 3 1",
        "99999999999999999999 1",
        "a b",
    ],
)
@pytest.mark.parametrize("convention", ["course", "airbus"])
def test_kaggle_files(tmp_path, text, convention):
    with pytest.raises(ValueError):
        decode_mask(text, 60, 80, convention)
    path = tmp_path / "kaggle.csv"
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([HEADER, ("0", text)])
    with pytest.raises(DataError, match=r"kaggle\.csv: line 2: "):
        read_submission(path, open_dataset(_set(tmp_path / "data", 1), "test"), convention)


def test_a_mask_of_all_pixels_passes(tmp_path):
    whole = rle_encode(np.ones((60, 80), bool))
    for convention in ("course", "airbus"):
        assert decode_mask(encode_mask(whole, convention), 60, 80, convention) == whole


@pytest.mark.parametrize("rle", DAMAGED)
def test_examples(rle):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(stream, "PNG")
    image = base64.b64encode(stream.getvalue()).decode()
    rows = to_rows([_predictions()])
    assert len(Example(image=image, rows=rows).rows) == 2
    rows[1] |= {"mask_size": rle["size"], "mask_counts": rle["counts"]}
    with pytest.raises(ValidationError):
        Example.model_validate_json(json.dumps({"image": image, "rows": rows}))
    for change in ({"mask_size": None}, {"mask_size": [60, 80], "mask_counts": None}):
        rows[1] |= change
        with pytest.raises(ValidationError):
            Example.model_validate_json(json.dumps({"image": image, "rows": rows}))


@pytest.mark.parametrize("damage", ["mask", "json", "bytes", "rows"])
def test_kept_measurements(tmp_path, damage):
    dataset, kept = open_dataset(_set(tmp_path / "data", 3), "test"), tmp_path / "kept.jsonl"
    whole = measure({"m": Finder()}, dataset, lambda items, *_: items, kept=kept)["m"]
    lines = kept.read_bytes().splitlines()
    content = json.loads(lines[1])
    content[3][0]["mask_counts"] = content[3][0]["mask_counts"][:-1]
    damaged = {"mask": json.dumps(content).encode(), "json": lines[1][:40], "bytes": b"\xff\xfe" + lines[1][2:]}
    lines[1] = damaged.get(damage, json.dumps([*content[:3], [{"image_id": "1"}]]).encode())
    kept.write_bytes(b"\n".join(lines) + b"\n")
    again = measure({"m": Finder()}, dataset, lambda items, *_: items, kept=kept)["m"]
    assert again.predictions == whole.predictions


def test_a_polygon_that_reaches_beyond_all_images_does_not_break_the_process(tmp_path):
    folder = _set(tmp_path, 1)
    content = json.loads((folder / "test_coco.json").read_text())
    content["annotations"][0]["segmentation"] = [[1, 1, 1e12, 1, 1e12, 50, 1, 50]]
    (folder / "test_coco.json").write_text(json.dumps(content))
    data = open_dataset(folder, "test")
    assert data.samples[0].masks == (None,)
    assert "1 odd polygons dropped" in data.problems.summary()
