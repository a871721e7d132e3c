"""Geometry against pycocotools and brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from models.geometry.boxes import box_iou, clip_boxes, crop_window, xywh_to_xyxy, xyxy_to_xywh
from models.geometry.rle import rle_area, rle_boxes, rle_decode, rle_encode, rle_from_polygons, rle_iou, rle_paste


@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_paste_equals_encoding_of_the_dense_mask(mask, left, top, right, bottom):
    dense = np.pad(mask, ((top, bottom), (left, right)))
    assert rle_paste(mask, left, top, *dense.shape) == rle_encode(dense)


def test_paste_outside_the_image_is_an_error():
    with pytest.raises(ValueError, match="leaves the image"):
        rle_paste(np.ones((4, 4), bool), 3, 0, 6, 6)


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
def test_rle_round_trip_area_and_box(mask):
    rle = rle_encode(mask)
    assert (rle_decode(rle) == mask).all()
    assert rle_area([rle])[0] == mask.sum()
    rows, columns = np.nonzero(mask)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if mask.any() else [0, 0, 0, 0]
    assert rle_boxes([rle])[0].tolist() == expected


def test_empty_lists_of_masks():
    assert rle_area([]).shape == (0,)
    assert rle_boxes([]).shape == (0, 4)
    assert rle_iou([], []).shape == (0, 0)


def test_box_iou_equals_pycocotools():
    rng = np.random.default_rng(0)
    a, b = (np.concatenate([p := rng.uniform(0, 50, (40, 2)), p + rng.uniform(0.1, 30, (40, 2))], 1) for _ in range(2))
    expected = coco_mask.iou(xyxy_to_xywh(a), xyxy_to_xywh(b), [0] * 40)
    assert np.allclose(box_iou(a, b), expected, atol=1e-9)


def test_rle_iou_equals_brute_force():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 5, 20, 30)) > 0.6
    expected = [[(x & y).sum() / (x | y).sum() for y in b] for x in a]
    assert np.allclose(rle_iou([rle_encode(x) for x in a], [rle_encode(y) for y in b]), expected)


@pytest.mark.parametrize(
    ("box", "margin"), [([0, 0, 1, 1], 0), ([-20, -20, 500, 500], 0.5), ([59.9, 39.9, 60, 40], 0), ([70, 70, 80, 80], 0)]
)
def test_crop_window_is_inside_and_not_empty(box, margin):
    x1, y1, x2, y2 = crop_window(box, 40, 60, margin)
    assert 0 <= x1 < x2 <= 60
    assert 0 <= y1 < y2 <= 40


def test_a_margin_is_a_share_of_the_boxs_own_width_and_height():
    assert crop_window([40, 20, 60, 30], 100, 100, 0.5) == (30, 15, 70, 35)


def test_boxes_of_no_instances_keep_their_shape():
    for function in (xywh_to_xyxy, xyxy_to_xywh, lambda b: clip_boxes(b, 5, 5)):
        assert function(np.zeros((0, 4))).shape == (0, 4)
    assert box_iou(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)


def test_polygons_are_rasterised_as_pycocotools_does():
    polygons = [[1, 1, 10, 1, 10, 8, 1, 8], [20, 20, 25, 20, 22, 28]]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 30, 40)))
    assert (rle_decode(rle_from_polygons(polygons, 30, 40)) == expected).all()
