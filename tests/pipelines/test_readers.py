"""Readers of COCO and of the course's layout: what they accept, count, and refuse."""

import json

import numpy as np
import pytest

from models.errors import DataError
from models.geometry.rle import rle_area, rle_encode
from pipelines.data.readers.opening import open_dataset
from tests.conftest import write_image

SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]


CATEGORIES = ({"id": 7, "name": "Plane"}, {"id": 1, "name": "ship"})


def _coco(folder, annotations, images=("a.png", "b.png"), categories=CATEGORIES):
    for i, name in enumerate(images):
        write_image(folder / "train" / name, seed=i)
    content = {
        "images": [{"id": i + 1, "file_name": n, "height": 60, "width": 80} for i, n in enumerate(images)],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 7, "iscrowd": 0, **a} for i, a in enumerate(annotations)
        ],
        "categories": list(categories),
    }
    path = folder / "train_coco.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_category_by_name_in_any_case(tmp_path):
    _coco(tmp_path, [{"bbox": [1, 2, 3, 4]}, {"bbox": [5, 5, 9, 9], "category_id": 1}])
    data = open_dataset(tmp_path, "train")
    assert (len(data), data.planes, data.category_id) == (2, 1, 7)
    assert data.samples[0].boxes.tolist() == [[1, 2, 4, 6]]
    assert data.samples[0].number == 1
    assert data.problems.summary() == ""


def test_coco_masks_from_polygons_and_both_kinds_of_rle(tmp_path):
    dense = np.zeros((60, 80), bool)
    dense[10:30, 10:30] = True
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], dense.T.ravel(), [0]]))), prepend=0).tolist()
    counts = [*runs, 60 * 80 - sum(runs)]
    box = {"bbox": [10, 10, 20, 20]}
    segmentations = [[SQUARE], rle_encode(dense), {"size": [60, 80], "counts": counts}]
    _coco(tmp_path, [{**box, "segmentation": s} for s in segmentations])
    data = open_dataset(tmp_path, "train")
    assert data.has_masks
    assert rle_area(data.samples[0].masks).tolist() == [400, 400, 400]


@pytest.mark.parametrize(
    ("annotation", "kind", "left"),
    [
        ({"bbox": [100, 10, 5, 5]}, "boxes outside their image dropped", 0),
        ({"bbox": [70, 50, 30, 30]}, "boxes clipped to their image", 1),
        ({"bbox": [1, 1, 0, 5]}, "without usable box or outline dropped", 0),
        ({"bbox": [1, 1, "x", 5]}, "without usable box or outline dropped", 0),
        ({"segmentation": [SQUARE]}, "boxes taken from the outline", 1),
        ({"bbox": [1, 1, 5, 5], "segmentation": [[1, 2, 3]]}, "odd polygons dropped", 1),
        ({"bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 2, 2]]}, "odd polygons dropped", 1),
        ({"bbox": [1, 1, 5, 5], "segmentation": [[90, 90, 95, 90, 95, 95]]}, "empty outlines dropped", 1),
        ({"bbox": [1, 1, 5, 5], "segmentation": {"size": [9, 9], "counts": "abc"}}, "unusable outlines dropped", 1),
        ({"bbox": [1, 1, 5, 5], "segmentation": {"size": [60, 80], "counts": [3, 4]}}, "unusable outlines dropped", 1),
        ({"bbox": [1, 1, 5, 5], "image_id": 99}, "annotations of unknown images dropped", 0),
        ({"bbox": [1, 1, 5, 5], "category_id": 42}, "annotations of unknown categories dropped", 0),
    ],
)
def test_coco_problems_are_counted_and_survived(tmp_path, annotation, kind, left):
    _coco(tmp_path, [annotation])
    data = open_dataset(tmp_path, "train")
    assert data.planes == left
    assert f"1 {kind}" in data.summary() or f"1 annotations {kind}" in data.summary()
    assert "\n" not in data.summary()


def test_duplicate_annotation_ids_are_dropped_and_counted(tmp_path):
    _coco(tmp_path, [{"bbox": [1, 1, 5, 5]}, {"bbox": [2, 2, 5, 5], "id": 1}])
    data = open_dataset(tmp_path, "train")
    assert data.planes == 1
    assert "1 duplicate annotation ids dropped" in data.summary()


def test_a_missing_image_is_counted_and_none_at_all_is_fatal(tmp_path):
    path = _coco(tmp_path, [])
    (tmp_path / "train" / "a.png").unlink()
    assert "1 missing images left out (first: train_coco.json image a.png)" in open_dataset(path, "train").summary()
    (tmp_path / "train" / "b.png").unlink()
    with pytest.raises(DataError, match=r"train_coco\.json: none of its 2 images was found"):
        open_dataset(path, "train")


def test_unreadable_images_and_wrong_sizes_are_counted(tmp_path):
    path = _coco(tmp_path, [])
    (tmp_path / "train" / "a.png").write_bytes(b"broken")
    write_image(tmp_path / "train" / "b.png", 33, 44)
    data = open_dataset(path, "train")
    assert "1 unreadable images left out" in data.summary()
    assert "1 image sizes corrected" in data.summary()
    assert (data.samples[0].height, data.samples[0].width) == (33, 44)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "neither COCO"),
        ('{"images": [{"id": 1}]}', r"images\[0\] has no id or file_name"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', "image id 1 appears twice"),
        ('{"images": [], "annotations": [{"image_id": 1}]}', "no list of categories"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "ship"}]}',
            "no category 'plane'; it has: ship; rename it there, or train with --set data.category=NAME",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [4], "categories": [{"id": 1, "name": "plane"}]}',
            "no image_id",
        ),
        ('[{"bbox": [1, 2, 3, 4]}]', "file_name"),
    ],
)
def test_files_of_no_use_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        open_dataset(path)
    assert "odd.json" in str(error.value)


def test_course_layout_with_images_that_have_no_planes(tmp_path):
    for i, name in enumerate(("P1.png", "P2.png", "P3.png")):
        write_image(tmp_path / "train" / name, seed=i)
    write_image(tmp_path / "test" / "P9.png")
    entry = {
        "image_id": 5,
        "category_id": 4,
        "iscrowd": 0,
        "area": 400.0,
        "bbox": [10, 10, 20, 20],
        "segmentation": [SQUARE],
    }
    entries = [
        {**entry, "id": 1, "file_name": "P1.png", "category_name": "plane"},
        {**entry, "id": 1, "file_name": "P1.png", "category_name": "plane"},
        {**entry, "id": 2, "file_name": "P2.png", "category_name": "ship"},
        {**entry, "id": 3, "file_name": "P8.png", "category_name": "plane"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    data = open_dataset(tmp_path, "train")
    assert [s.image_id for s in data.samples] == ["P1", "P2", "P3"]
    assert [len(s.boxes) for s in data.samples] == [1, 0, 0]
    assert "1 duplicate annotation ids dropped" in data.summary()
    assert "1 missing images left out (first: P8.png)" in data.summary()
    test = open_dataset(tmp_path, "test")
    assert not test.has_truth
    assert "no ground truth" in test.summary()


def test_course_and_coco_forms_of_the_real_data_agree(isaid):
    course, coco = (open_dataset(isaid / f"train{end}.json", "train") for end in ("", "_coco"))
    assert (len(course), course.planes, coco.planes) == (4, 42, 42)
    assert course.digest() == coco.digest()
    assert open_dataset(isaid, "test").planes == 8


def test_a_folder_a_glob_and_one_image(tmp_path):
    for name in ("x/one.png", "x/two.png", "y/one.png"):
        write_image(tmp_path / name)
    (tmp_path / "x" / "notes.txt").write_text("no image")
    assert [s.image_id for s in open_dataset(tmp_path / "x").samples] == ["one", "two"]
    assert [s.image_id for s in open_dataset(f"{tmp_path}/*/*.png").samples] == ["x/one.png", "two", "y/one.png"]
    assert len(open_dataset(tmp_path / "x" / "one.png")) == 1
    for where, message in (
        ("absent", "no such file"),
        ("x/*.tif", "no images there"),
        ("x/notes.txt", "cannot|not an image"),
    ):
        with pytest.raises(DataError, match=message):
            for sample in open_dataset(str(tmp_path / where)).samples:
                sample.read()


def test_the_digest_sees_pixels_and_planes_but_not_places(tmp_path):
    path = _coco(tmp_path / "one", [{"bbox": [1, 2, 3, 4]}])
    first = open_dataset(path).digest()
    moved = _coco(tmp_path / "two", [{"bbox": [1, 2, 3, 4]}])
    assert open_dataset(moved).digest() == first
    assert open_dataset(_coco(tmp_path / "three", [{"bbox": [1, 2, 3, 5]}])).digest() != first
    write_image(tmp_path / "two" / "train" / "a.png", seed=9)
    assert open_dataset(moved).digest() != first
