"""No two images are confused: COCO ids of two splits, file names of two folders, pictures of ids that look alike."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models.geometry.rle import rle_encode
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from scoring.writers.coco import write_results
from scoring.writers.kaggle import read_submission, write_submission
from scoring.writers.walk import file_stem
from tests.conftest import write_image


def _coco(folder, split, names):
    for i, name in enumerate(names):
        write_image(folder / split / name, 20, 30, i)
    images = [{"id": i, "file_name": name, "height": 20, "width": 30} for i, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": [], "categories": [{"id": 7, "name": "plane"}]}
    (folder / f"{split}_coco.json").write_text(json.dumps(content))


def _predictions(dataset):
    """A plane in each image, at a place of its own."""
    predictions = []
    for i, sample in enumerate(dataset.samples):
        mask = np.zeros((20, 30), bool)
        mask[i, i : i + 3] = True
        predictions.append(Instances.make(sample.image_id, 20, 30, [[i, i, i + 3, i + 1]], [0.5], masks=[rle_encode(mask)]))
    return predictions


def test_images_of_two_splits_have_numbers_of_their_own(tmp_path):
    _coco(tmp_path, "train", ["a.png", "b.png"])
    _coco(tmp_path, "test", ["b.png", "c.png"])
    dataset = open_dataset(tmp_path, "train+test")
    write_results(_predictions(dataset), dataset, tmp_path / "out.json")
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [e["image_id"] for e in entries] == [1, 2, 3, 4]
    assert [e["file_name"] for e in entries] == ["a.png", "train/b.png", "test/b.png", "c.png"]
    one = open_dataset(tmp_path, "test")
    write_results(_predictions(one), one, tmp_path / "out.json")
    assert [(e["image_id"], e["file_name"]) for e in json.loads((tmp_path / "out.json").read_text())] == [
        (1, "b.png"),
        (2, "c.png"),
    ]


@pytest.mark.parametrize(
    "names", [("x/a.png", "y/a.png", "y/b.png"), ("a.png", "a.jpg", "b.png"), ("a.png", "x/a.jpg", "c.png")]
)
def test_a_submission_tells_images_of_one_name_apart(names, tmp_path):
    for i, name in enumerate(names):
        write_image(tmp_path / "in" / name, 20, 30, i)
    dataset = open_dataset(str(tmp_path / "in" / "**" / "*.*"))
    predictions = _predictions(dataset)
    write_submission(predictions, dataset, tmp_path / "kaggle.csv")
    back = {f.image_id: f for f in read_submission(tmp_path / "kaggle.csv", dataset)}
    assert {k: f.masks for k, f in back.items()} == {f.image_id: f.masks for f in predictions}
    rows = (tmp_path / "kaggle.csv").read_text().splitlines()[1:]
    assert len({row.partition(",")[0] for row in rows}) == 3
    # What only one image is called stays as the course wants it.
    assert any(row.startswith(("b,", "c,")) for row in rows)


def test_files_made_of_an_image_have_names_of_their_own():
    ids = ("a/b", "a_b", "a b", "a/bc", "a%2Fb", "a%252Fb", "a%b", "50%")
    assert len({file_stem(i) for i in ids}) == len(ids)
    assert file_stem("50%") == "50%"
    assert file_stem("P0001__1__824___0") == "P0001__1__824___0"
