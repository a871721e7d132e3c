"""The Kaggle CSV: the course's convention and Airbus', against dense references; round trips; odd files."""

import csv
import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import DataError
from models.geometry.rle import rle_counts, rle_crop, rle_decode, rle_encode, rle_paste
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from scoring.comparison.evaluate_file import evaluate_file
from scoring.writers.kaggle import decode_mask, encode_mask, read_submission, write_submission
from tests.conftest import write_image

MASKS = st.tuples(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
)


def _dense(case):
    height, width, seed, share = case
    return np.random.default_rng(seed).random((height, width)) < share


def _reference(dense, convention):
    flat = dense.ravel("C") if convention == "course" else dense.ravel("F")
    numbers, position = [], 0
    for value, run in itertools.groupby(flat.tolist()):
        length = len(list(run))
        if value:
            numbers += [position + (convention == "airbus"), length]
        position += length
    return " ".join(map(str, numbers))


@given(MASKS)
def test_both_conventions_equal_the_flattened_mask(case):
    dense = _dense(case)
    for convention in ("course", "airbus"):
        assert encode_mask(rle_encode(dense), convention) == _reference(dense, convention)


@given(MASKS)
def test_round_trips(case):
    dense = _dense(case)
    for convention in ("course", "airbus"):
        text = encode_mask(rle_encode(dense), convention)
        assert decode_mask(text, *dense.shape, convention) == rle_encode(dense)


@given(MASKS)
def test_runs_and_crops_of_an_rle(case):
    dense = _dense(case)
    rle = rle_encode(dense)
    runs = [len(list(r)) for _, r in itertools.groupby(dense.ravel("F").tolist())]
    expected = ([0] if dense.ravel("F")[0] else []) + runs
    assert rle_counts(rle).tolist() == expected
    part, left, top = rle_crop(rle)
    assert part.sum() == dense.sum()
    if dense.any():
        assert rle_paste(part, left, top, *dense.shape) == rle
        assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))


def test_large_runs_are_decoded():
    dense = np.zeros((700, 900), bool)
    dense[3:690, 5:7] = dense[100:103, 300:880] = True
    assert np.array_equal(rle_decode(decode_mask(encode_mask(rle_encode(dense)), 700, 900)), dense)


def test_many_masks_of_a_large_image_need_no_dense_memory():
    rng = np.random.default_rng(0)
    rles = []
    for _ in range(200):
        y, x = rng.integers(0, 3900, 2)
        rles.append(rle_paste(rng.random((60, 80)) < 0.6, int(x), int(y), 4000, 4000))
    tracemalloc.start()
    texts = [encode_mask(rle) for rle in rles]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One dense mask of 4,000 x 4,000 has 16 MB; the texts themselves have some 4.
    assert peak - sum(map(len, texts)) < 8e6
    assert decode_mask(texts[0], 4000, 4000) == rles[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "pairs of start and length"),
        ("3 x", "not whole numbers"),
        ("3 0", "at least one pixel"),
        ("-1 2", "ascending"),
        ("5 3 6 1", "apart"),
        ("90 11", "the image has 100"),
    ],
)
def test_odd_runs_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(text, 10, 10)
    assert decode_mask("99 1", 10, 10) == rle_encode(np.pad([[True]], [(9, 0), (9, 0)]))


@pytest.fixture
def data(tmp_path):
    for name in ("b.x", "a"):
        write_image(tmp_path / "images" / f"{name}.png", 20, 30)
    return open_dataset(str(tmp_path / "images"))


def _planes(image_id, *masks):
    return Instances.make(image_id, 20, 30, [[0, 0, 9, 9]] * len(masks), np.linspace(0.9, 0.5, len(masks)), masks=masks)


def test_the_file_is_the_courses(tmp_path, data):
    mask = rle_paste(np.ones((2, 3), bool), 4, 1, 20, 30)
    path = tmp_path / "k.csv"
    write_submission([_planes("b.x", mask, rle_encode(np.zeros((20, 30), bool)))], data, path)
    assert path.read_text() == "ImageId,EncodedPixels\na,[]\nb.x,34 3 64 3\n"
    write_submission([_planes("b.x", mask)], data, path, "airbus")
    assert path.read_text().splitlines()[2] == "b.x,82 2 102 2 122 2"
    back = {f.image_id: f for f in read_submission(path, data, "airbus")}
    assert back["b.x"].masks == (mask,)
    assert len(back["a"]) == 0
    assert back["b.x"].boxes.tolist() == [[4, 1, 7, 3]]


def test_rows_keep_their_rank(tmp_path, data):
    masks = [rle_paste(np.ones((1, k + 1), bool), k, k, 20, 30) for k in range(5)]
    write_submission([_planes("a", *masks)], data, tmp_path / "k.csv")
    assert list(read_submission(tmp_path / "k.csv", data)[0].masks) == masks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Image,Pixels\n", "expected 'ImageId,EncodedPixels'"),
        ("ImageId,EncodedPixels\nz,[]\n", "line 2: image 'z' is not in"),
        ("ImageId,EncodedPixels\na,1 2 3\n", "line 2: 3 numbers, .*is --rle course right"),
        ("ImageId,EncodedPixels\na\n", "line 2: 1 fields"),
        ("ImageId,EncodedPixels\na,599 2\n", "reach pixel 600"),
    ],
)
def test_odd_files_are_refused(tmp_path, data, content, message):
    path = tmp_path / "k.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_submission(path, data)
    assert csv.field_size_limit() > 1e6


def test_a_submission_of_images_some_of_which_have_annotations_is_measured_over_those(tmp_path, caplog):
    """The course's: training images with outlines and test images without, handed in as one file."""
    square = np.zeros((60, 80), bool)
    square[10:40, 10:40] = True
    outline = [10, 10, 40, 10, 40, 40, 10, 40]
    entry = {
        "file_name": "a.png",
        "category_name": "plane",
        "bbox": [10, 10, 30, 30],
        "segmentation": [outline],
        "iscrowd": 0,
    }
    for split, name in (("train", "a"), ("test", "b")):
        write_image(tmp_path / split / f"{name}.png", 60, 80)
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    found = [Instances.make(name, 60, 80, [[10, 10, 40, 40]], [1.0], masks=[rle_encode(square)]) for name in "ab"]
    both = open_dataset(tmp_path, "train+test", keep=True)
    write_submission(found, both, tmp_path / "kaggle.csv")
    with caplog.at_level("INFO", "scoring"):
        (masks,) = evaluate_file(tmp_path / "kaggle.csv", both, score_threshold=0.05, convention="course")
    # What was found where nothing is known is neither right nor wrong.
    assert masks.metrics["AP"] == pytest.approx(1.0)
    assert "1 of 2 images have no annotations: measured over the others" in caplog.text
    nothing = open_dataset(tmp_path, "test", keep=True)
    write_submission(found[1:], nothing, tmp_path / "test.csv")
    with pytest.raises(DataError, match="no ground truth to evaluate against"):
        evaluate_file(tmp_path / "test.csv", nothing, score_threshold=0.05, convention="course")
