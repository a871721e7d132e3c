"""The result type: it refuses what its fields do not promise, and equals what has the same content."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.geometry.rle import CropMask, rle_bytes, rle_crop, rle_decode, rle_encode, rle_paste
from models.instances import Instances, from_rows, to_rows

HEIGHT, WIDTH = 6, 8
FLOATS = st.floats(0, 1, width=32)


def _mask(bits):
    return rle_encode(np.array([bits >> i & 1 for i in range(HEIGHT * WIDTH)], np.uint8).reshape(HEIGHT, WIDTH))


@st.composite
def instances(draw, least=0):
    """Predictions of one small image, with masks or without."""
    count = draw(st.integers(least, 5))
    column = lambda values: draw(st.lists(values, min_size=count, max_size=count))  # noqa: E731
    masks = column(st.integers(0, 2 ** (HEIGHT * WIDTH) - 1)) if draw(st.booleans()) else None
    return Instances.make(
        draw(st.sampled_from(["a", "b/c"])),
        HEIGHT,
        WIDTH,
        column(st.tuples(FLOATS, FLOATS, FLOATS, FLOATS)),
        column(FLOATS),
        labels=column(st.integers(0, 3)),
        masks=None if masks is None else [_mask(bits) for bits in masks],
    )


FIELDS = {
    "image_id": "a",
    "height": HEIGHT,
    "width": WIDTH,
    "boxes": np.array([[0, 0, 2, 2], [1, 1, 3, 4]], np.float32),
    "scores": np.array([0.9, 0.4], np.float32),
    "labels": np.array([0, 1], np.int64),
    "masks": (_mask(3), _mask(12)),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("boxes", np.zeros((1, 4), np.float32), r"boxes are float32 \(1, 4\), expected float32 \(2, 4\)"),
        ("boxes", np.zeros((2, 5), np.float32), r"boxes are float32 \(2, 5\)"),
        ("boxes", np.zeros(8, np.float32), r"boxes are float32 \(8,\)"),
        ("boxes", np.zeros((2, 4)), r"boxes are float64 \(2, 4\)"),
        ("boxes", [[0, 0, 2, 2], [1, 1, 3, 4]], "boxes are list of 2"),
        ("scores", np.array([0.9], np.float32), "boxes are"),
        ("scores", np.array([0.9, 0.4]), r"scores are float64 \(2,\), expected float32 \(2,\)"),
        ("scores", np.array([[0.9], [0.4]], np.float32), r"scores are float32 \(2, 1\)"),
        ("scores", np.float32(0.9), "boxes are"),
        ("scores", None, "boxes are"),
        ("scores", np.array([0.4, 0.9], np.float32), "scores rise"),
        ("labels", np.array([0], np.int64), r"labels are int64 \(1,\), expected int64 \(2,\)"),
        ("labels", np.array([0, 1], np.int32), r"labels are int32 \(2,\)"),
        ("masks", (_mask(3),), "masks are tuple of 1, expected a tuple of 2"),
        ("masks", [_mask(3), _mask(12)], "masks are list of 2, expected a tuple of 2"),
        ("masks", (_mask(3), None), r"mask 1 is NoneType, expected an RLE of size \[6, 8\]"),
        (
            "masks",
            (_mask(3), rle_encode(np.ones((WIDTH, HEIGHT)))),
            r"mask 1 is an RLE of size \[8, 6\], expected an RLE of size \[6, 8\]",
        ),
    ],
)
def test_a_field_that_breaks_its_promise_is_refused_by_name(field, value, message):
    assert len(Instances(**FIELDS)) == 2
    with pytest.raises(ValueError, match=f"image 'a': {message}"):
        Instances(**{**FIELDS, field: value})


def test_equal_scores_and_scores_that_are_no_numbers_are_in_order():
    for scores in ([0.5, 0.5], [0.5, np.nan], [np.nan, np.nan]):
        assert len(replace(Instances(**FIELDS), scores=np.array(scores, np.float32))) == 2


def test_make_refuses_columns_of_other_lengths_and_masks_of_other_sizes():
    box = [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match="boxes, scores, labels differ in length: 1, 2, 1"):
        Instances.make("a", HEIGHT, WIDTH, box, [0.1, 0.2])
    with pytest.raises(ValueError, match="masks and boxes differ in length: 2, 1"):
        Instances.make("a", HEIGHT, WIDTH, box, [0.1], masks=[_mask(1)] * 2)
    with pytest.raises(ValueError, match="mask 0 is an RLE of size"):
        Instances.make("a", WIDTH, HEIGHT, box, [0.1], masks=[_mask(1)])


def test_take_refuses_an_index_that_turns_the_order_round():
    whole = Instances(**FIELDS)
    assert whole.take(np.array([1])).labels.tolist() == [1]
    with pytest.raises(ValueError, match="scores rise"):
        whole.take(np.array([1, 0]))


@given(instances())
def test_equal_is_what_has_the_same_content(one):
    masks = None if one.masks is None else tuple(rle_bytes(m) for m in one.masks)
    copy = replace(one, boxes=one.boxes.copy(), scores=one.scores.copy(), labels=one.labels.copy(), masks=masks)
    assert one == copy
    assert pickle.loads(pickle.dumps(one)) == one
    if len(one):
        assert from_rows(to_rows([one])) == [one]
        assert one != one.take(np.arange(len(one) - 1))


@given(instances(least=1), st.data())
def test_a_change_of_any_field_makes_it_unequal(one, data):
    row = data.draw(st.integers(0, len(one) - 1))
    boxes, scores, labels = one.boxes.copy(), one.scores.copy(), one.labels.copy()
    boxes[row, data.draw(st.integers(0, 3))] += 1
    scores[: row + 1] += 1
    labels[row] += 1
    none = tuple(rle_encode(np.zeros((HEIGHT, WIDTH))) for _ in range(len(one)))
    changes = [{"image_id": "other"}, {"boxes": boxes}, {"scores": scores}, {"labels": labels}]
    changes.append({"masks": none if one.masks is None else None})
    if one.masks is not None:
        turned = list(one.masks)
        turned[row] = rle_encode(~rle_decode(turned[row]))
        changes.append({"masks": tuple(turned)})
    for change in changes:
        assert one != replace(one, **change), change
    bare = replace(one, masks=None)
    assert bare != replace(bare, height=HEIGHT + 1)
    assert bare != replace(bare, width=WIDTH + 1)


def test_what_is_not_a_number_equals_itself_and_nothing_equals_another_type():
    one = replace(Instances(**FIELDS), scores=np.array([0.5, np.nan], np.float32))
    assert one == replace(one, scores=one.scores.copy())
    assert one != replace(one, scores=np.array([0.5, 0.4], np.float32))
    assert one != "a"
    assert Instances.__eq__(one, "a") is NotImplemented


def test_there_is_no_hash_because_arrays_have_none():
    with pytest.raises(TypeError, match="unhashable"):
        hash(Instances(**FIELDS))


@pytest.mark.parametrize("masks", [False, True])
def test_an_empty_one_has_the_types_of_others(masks):
    empty = Instances.empty("a", HEIGHT, WIDTH, masks=masks)
    assert (len(empty), empty.masks) == (0, () if masks else None)
    assert (empty.boxes.shape, empty.boxes.dtype, empty.scores.dtype) == ((0, 4), np.float32, np.float32)
    assert (empty.labels.dtype, empty.image_id, empty.height, empty.width) == (np.int64, "a", HEIGHT, WIDTH)
    others = Instances(**{**FIELDS, "masks": FIELDS["masks"] if masks else None})
    assert others.above(1.0) == empty
    assert Instances.empty("a", HEIGHT, WIDTH, masks=not masks) != empty


@given(st.integers(0, 2 ** (HEIGHT * WIDTH) - 1))
def test_a_crop_pastes_back_to_its_mask(bits):
    rle = _mask(bits)
    crop = rle_crop(rle)
    assert isinstance(crop, CropMask)
    assert crop.mask.dtype == bool
    assert rle_paste(crop.mask, crop.left, crop.top, HEIGHT, WIDTH) == rle
    # Tight: its outer rows and columns hold a pixel each.
    if bits:
        assert crop.mask[[0, -1]].any(axis=1).all()
        assert crop.mask[:, [0, -1]].any(axis=0).all()
    else:
        assert (crop.mask.shape, crop.left, crop.top) == ((0, 0), 0, 0)


def test_a_score_at_the_threshold_is_kept():
    assert len(Instances.make("a", 9, 9, [[0, 0, 1, 1]], [0.5]).above(0.5)) == 1
