"""A split that a folder does not have is an error that says which it has; plain folders have none."""

from __future__ import annotations

import json

import pytest

from models.errors import DataError
from pipelines.data.readers.opening import open_dataset
from pipelines.use_cases.training import open_test
from tests.conftest import write_image
from tests.scoring.test_ids import _coco


def _annotated(folder, *names):
    images = []
    for i, name in enumerate(("a.png", "b.png")):
        write_image(folder / name, 20, 30, i)
        images.append({"id": i, "file_name": name, "height": 20, "width": 30})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "plane"}]}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("test_coco.json", "train_coco.json"), "test, train"),
        (("annotations/instances_val2017.json",), "val"),
        (("annotations/instances_test.json", "train/_annotations.coco.json"), "test, train"),
    ],
)
def test_a_split_that_is_not_there(names, known, tmp_path):
    folder = _annotated(tmp_path / "d", *names)
    for split in ("tset", "tain", f"{known.split(', ')[0]}+tset"):
        with pytest.raises(DataError, match=rf"no split '(tset|tain)'; it has: {known}"):
            open_dataset(folder, split)
    assert len(open_dataset(folder, known.split(", ")[0])) == 2
    assert not open_dataset(folder, "all").has_truth


def test_a_typo_is_answered_with_the_nearest_name(tmp_path):
    folder = _annotated(tmp_path / "d", "test_coco.json")
    with pytest.raises(DataError, match="did you mean test"):
        open_dataset(folder, "tset")


def test_the_courses_layout(tmp_path):
    entry = {"file_name": "a.png", "category_name": "plane", "bbox": [1, 2, 5, 6], "id": 1}
    write_image(tmp_path / "train" / "a.png", 20, 30)
    write_image(tmp_path / "test" / "b.png", 20, 30)
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    assert open_dataset(tmp_path, "train").planes == 1
    # Without annotations, but a folder of images by that name.
    assert not open_dataset(tmp_path, "test").has_truth
    with pytest.raises(DataError, match="no split 'val'; it has: test, train"):
        open_dataset(tmp_path, "val")


def test_plain_folders_stay_as_they_are(tmp_path):
    write_image(tmp_path / "a.png", 20, 30)
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "deep").mkdir()
    for split in ("test", "all", "anything"):
        assert len(open_dataset(tmp_path, split)) == 1


def test_training_goes_on_without_a_test_split(tmp_path, caplog):
    folder = _annotated(tmp_path / "d", "train_coco.json")
    with caplog.at_level("INFO"):
        assert open_test(str(folder), "plane", None) is None
    assert "no test set" in caplog.text


def test_a_list_of_relative_and_absolute_paths(tmp_path, monkeypatch):
    write_image(tmp_path / "x" / "a.png", 20, 30, 1)
    write_image(tmp_path / "y" / "a.png", 20, 30, 2)
    (tmp_path / "list.csv").write_text(f"path\nx/a.png\n{tmp_path / 'y' / 'a.png'}\nhttp://127.0.0.1:9/z/a.png\n")
    for rows in (2, 3):
        lines = (tmp_path / "list.csv").read_text().splitlines()[: rows + 1]
        (tmp_path / "part.csv").write_text("\n".join(lines))
        dataset = open_dataset(tmp_path / "part.csv")
        assert len({s.image_id for s in dataset.samples}) == rows
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.csv").write_text("\n".join(["path", "x/a.png", str(tmp_path / "y" / "a.png")]))
    assert {s.image_id for s in open_dataset("part.csv").samples} == {"x/a.png", "y/a.png"}


def test_problems_of_every_split_are_told(tmp_path):
    for split in ("train", "test"):
        _coco(tmp_path, split, [f"{split}_a.png", f"{split}_b.png"])
        (tmp_path / split / f"{split}_a.png").unlink()
    both = open_dataset(tmp_path, "train+test", keep=True)
    assert sum(both.problems.counts.values()) == 2
    assert len(both) == 4
