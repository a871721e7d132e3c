"""Images that are not of the size that their annotations say: scaled, turned, or refused; never taken as they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from models.errors import DataError
from models.geometry.rle import rle_area, rle_decode, rle_encode
from models.images.decoding import Header
from pipelines.data.readers.opening import open_dataset
from pipelines.data.readers.sizes import fit

BOX = (20, 10, 44, 28)


def _plane(height, width):
    """A bright plane in BOX of an image: pixels, and the annotation with each kind of outline."""
    pixels = np.zeros((height, width), np.uint8)
    x1, y1, x2, y2 = BOX
    pixels[y1:y2, x1:x2] = 255
    mask = pixels > 0
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.T.ravel().astype(int), [2]]))))
    box = {"bbox": [x1, y1, x2 - x1, y2 - y1]}
    outlines = {
        "polygon": [[x1, y1, x2, y1, x2, y2, x1, y2]],
        "flat polygon": [x1, y1, x2, y1, x2, y2, x1, y2],
        "rle": rle_encode(mask),
        "runs": {"size": [height, width], "counts": runs.tolist()},
        "outline alone": [[x1, y1, x2, y1, x2, y2, x1, y2]],
    }
    return pixels, {k: {**({} if k == "outline alone" else box), "segmentation": v} for k, v in outlines.items()}


def _write(folder, annotations, stated, image, suffix="png", **options):
    (folder / "train").mkdir(parents=True, exist_ok=True)
    image.save(folder / "train" / f"a.{suffix}", **options)
    size = {} if stated is None else {"height": stated[0], "width": stated[1]}
    entries = [{"id": i, "image_id": 1, "category_id": 1, **a} for i, a in enumerate(annotations)]
    content = {
        "images": [{"id": 1, "file_name": f"a.{suffix}", **size}],
        "annotations": entries,
        "categories": [{"id": 1, "name": "plane"}],
    }
    (folder / "train_coco.json").write_text(json.dumps(content))
    return folder


def _lies_on_the_plane(sample, tolerance):
    """Every box and outline encloses what is bright in the image as it is decoded."""
    bright = sample.read()[:, :, 0] > 127
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(sample.boxes - expected).max() <= tolerance
    for mask in sample.masks:
        both = (rle_decode(mask) & bright).sum() / (rle_decode(mask) | bright).sum()
        assert both > 0.9


@pytest.mark.parametrize("kind", ["polygon", "flat polygon", "rle", "runs", "outline alone"])
@pytest.mark.parametrize("factor", [0.5, 0.731, 1.5, 3.0])
def test_annotations_of_a_resized_file_are_scaled(tmp_path, kind, factor):
    pixels, annotations = _plane(60, 80)
    size = (round(80 * factor), round(60 * factor))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    data = open_dataset(_write(tmp_path, [annotations[kind]], (60, 80), image), "train")
    (sample,) = data.samples
    assert (sample.width, sample.height) == size
    _lies_on_the_plane(sample, 1.0)
    summary = (
        "1 image sizes corrected from the file, annotations scaled (first: train_coco.json image a.png: 80x60, the file "
    )
    assert data.problems.summary().endswith(f"{summary}{size[0]}x{size[1]})")


@pytest.mark.parametrize("kind", ["polygon", "rle", "runs", "outline alone"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("factor", [1, 0.75])
def test_annotations_of_a_turned_file_are_turned_with_it(tmp_path, orientation, kind, factor):
    pixels, annotations = _plane(60, 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels).resize((round(80 * factor), round(60 * factor)))
    folder = _write(tmp_path, [annotations[kind]], (60, 80), image, "jpg", exif=exif, quality=98)
    (sample,) = open_dataset(folder, "train").samples
    turned = orientation >= 5
    assert (sample.height > sample.width) == turned
    if orientation in (2, 3, 4):
        # Equal sizes tell nothing: taken as made on the image as it is looked at.
        assert np.abs(sample.boxes - np.array(BOX) * factor).max() <= 0.5
        return
    _lies_on_the_plane(sample, 1.0)
    assert ("annotations with them" in open_dataset(folder, "train").problems.summary()) == turned


def test_annotations_made_on_the_turned_image_stay(tmp_path):
    pixels, annotations = _plane(80, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    folder = _write(tmp_path, [annotations["polygon"]], (80, 60), stored, "jpg", exif=exif, quality=98)
    assert ImageOps.exif_transpose(Image.open(folder / "train" / "a.jpg")).size == (60, 80)
    data = open_dataset(folder, "train")
    _lies_on_the_plane(data.samples[0], 1.0)
    assert data.problems.summary() == ""


@pytest.mark.parametrize("size", [(60, 60), (80, 60), (120, 80), (64, 80)])
def test_a_size_that_nothing_explains_refuses_the_image(tmp_path, size):
    _, annotations = _plane(60, 80)
    image = Image.fromarray(np.zeros(size, np.uint8))
    folder = _write(tmp_path, [annotations["polygon"]], (60, 80), image)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "train" / "b.png")
    content = json.loads((folder / "train_coco.json").read_text())
    content["images"].append({"id": 2, "file_name": "b.png", "height": 9, "width": 9})
    (folder / "train_coco.json").write_text(json.dumps(content))
    left = open_dataset(folder, "train")
    assert [s.image_id for s in left.samples] == ["b"]
    why = f"(first: train_coco.json image a.png: is {size[1]}x{size[0]}, its annotations are of 80x60)"
    assert f"1 images of another size left out {why}" == left.problems.summary()
    kept = open_dataset(folder, "train", keep=True).samples[0]
    assert (kept.lost, kept.height, kept.width, kept.boxes.tolist()) == ("other size", 60, 80, [list(BOX)])
    assert rle_area(kept.masks)[0] == 24 * 18
    with pytest.raises(DataError, match=f"is {size[1]} x {size[0]} pixels, its annotation says 80 x 60") as error:
        kept.read()
    assert error.value.kind == "other size"


def test_sizes_are_those_of_the_outlines_where_no_other_is_stated(tmp_path):
    pixels, annotations = _plane(60, 80)
    image = Image.fromarray(pixels).resize((160, 120))
    _lies_on_the_plane(open_dataset(_write(tmp_path / "a", [annotations["rle"]], None, image), "train").samples[0], 1.0)
    # Polygons alone state none.
    (sample,) = open_dataset(_write(tmp_path / "b", [annotations["polygon"]], None, image), "train").samples
    assert sample.boxes.tolist() == [list(BOX)]
    # The course's form.
    folder = _write(tmp_path / "c", [], None, image)
    (folder / "train_coco.json").unlink()
    entry = {"id": 1, "file_name": "a.png", "category_name": "plane", **annotations["rle"]}
    (folder / "train.json").write_text(json.dumps([entry]))
    _lies_on_the_plane(open_dataset(folder, "train").samples[0], 1.0)


def test_an_outline_of_the_files_own_size_stays(tmp_path):
    pixels, annotations = _plane(60, 80)
    large = np.kron(pixels, np.ones((2, 2), np.uint8))
    own = {**annotations["polygon"], "segmentation": rle_encode(large > 0)}
    folder = _write(tmp_path, [own, annotations["rle"]], (60, 80), Image.fromarray(large))
    (sample,) = open_dataset(folder, "train").samples
    assert [int(a) for a in rle_area(sample.masks)] == [4 * 24 * 18] * 2
    _lies_on_the_plane(sample, 0.01)


@pytest.mark.parametrize("stated", [(None, None), (0, 0), (-60, 80), ("x", 80), (60, None), (1, 1), (10, 10)])
def test_a_size_that_is_none_is_no_size(tmp_path, stated):
    pixels, annotations = _plane(60, 80)
    (sample,) = open_dataset(_write(tmp_path, [annotations["polygon"]], stated, Image.fromarray(pixels)), "train").samples
    assert (sample.height, sample.width, sample.boxes.tolist()) == (60, 80, [list(BOX)])


@pytest.mark.parametrize(
    ("stated", "orientation", "reported"),
    [
        (None, 6, True),
        (None, 1, False),
        ((60, 80), 3, True),
        ((60, 80), 1, False),
        ((60, 80), 6, False),
        ((80, 60), 6, False),
    ],
)
def test_what_an_orientation_tag_leaves_open_is_reported(tmp_path, stated, orientation, reported):
    pixels, annotations = _plane(60, 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = _write(tmp_path, [annotations["polygon"]], stated, Image.fromarray(pixels), exif=exif)
    kinds = open_dataset(folder, "train").problems.counts
    assert ("images with an orientation tag, taken as annotated the way they are looked at" in kinds) == reported


@pytest.mark.parametrize(
    "odd",
    [
        {"bbox": [20, 10, 0, 18]},
        {"bbox": "x"},
        {"segmentation": [[1, 2, 3]]},
        {"segmentation": "x"},
        {"segmentation": [[]]},
        {"segmentation": {"size": [60, 80], "counts": "0"}},
        {"segmentation": {"size": [60, 80]}},
        {"segmentation": {"size": "x", "counts": []}},
        {"segmentation": [None]},
        {},
    ],
)
def test_odd_annotations_of_a_resized_file_are_counted_as_ever(tmp_path, odd):
    pixels, _ = _plane(60, 80)
    small = Image.fromarray(pixels).resize((40, 30))
    for name, image in (("same", Image.fromarray(pixels)), ("other", small)):
        data = open_dataset(_write(tmp_path / name, [odd, {"bbox": [1, 1, 9, 9]}], (60, 80), image), "train")
        kinds = {kind for kind in data.problems.counts if "image sizes" not in kind}
        if name == "same":
            expected = kinds
    assert kinds == expected
    assert data.planes == 1


@pytest.mark.parametrize(
    ("stated", "size", "orientation", "expected"),
    [
        ((600, 800), (600, 800), 1, 1),
        ((600, 800), (600, 800), 6, None),
        ((800, 600), (600, 800), 6, 1),
        ((600, 800), (800, 600), 1, None),
        ((600, 800), (300, 400), 1, 1),
        ((601, 800), (300, 400), 1, 1),
        ((607, 800), (300, 400), 1, None),
        ((1065, 1600), (533, 800), 1, 1),
        ((300, 401), (600, 800), 1, 1),
    ],
)
def test_which_sizes_fit(stated, size, orientation, expected):
    # The size is as it lies in the file; a tag of 6 makes its height the width.
    fitting = fit(stated, Header(*size, orientation, False))
    if orientation == 6 and stated == size:
        assert fitting.turns
        return
    assert (None if fitting is None else fitting.orientation) == expected
