"""Merging of boxes against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from models.geometry.box_pairs import pairs_among
from models.geometry.boxes import box_area, box_iou
from models.tiling.matching import greedy_match, hull_groups


def _boxes(rng, count, extent, largest):
    corners = rng.integers(0, extent, (count, 2)).astype(float)
    return np.concatenate([corners, corners + rng.integers(1, largest + 1, (count, 2))], axis=1)


@st.composite
def fields(draw):
    """Boxes, scores and classes: sparse, in heaps, with giants among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(0, 60))
    boxes = _boxes(rng, count, draw(st.sampled_from([4, 40, 400])), draw(st.sampled_from([2, 30])))
    if count and draw(st.booleans()):
        boxes[0] = [0, 0, 420, 420]
    # Few different scores, so that there are ties.
    return boxes, rng.integers(1, 8, count) / 8, rng.integers(0, 2, count)


def overlap_matrix(boxes, metric):
    iou = box_iou(boxes, boxes)
    if metric == "iou":
        return iou
    areas = box_area(boxes)
    both = iou * (areas[:, None] + areas[None]) / (1 + iou)
    return both / np.minimum(areas[:, None], areas[None])


def brute_owners(boxes, scores, labels, threshold, metric):
    overlaps = overlap_matrix(boxes, metric)
    owner = np.full(len(boxes), -1)
    for i in np.argsort(-scores, kind="stable"):
        if owner[i] < 0:
            owner[i] = i
            owner[(owner < 0) & (labels == labels[i]) & (overlaps[i] >= threshold - 1e-12)] = i
    return owner


def suppress(boxes, scores, labels, threshold, metric="iou"):
    """Non-maximum suppression by `greedy_match`: the survivors, best first."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    owner = greedy_match(boxes, order, labels, threshold=threshold, metric=metric)
    return order[owner[order] == order]


@given(fields())
def test_pairs_are_those_that_meet(field):
    boxes = field[0]
    left, right = pairs_among(boxes)
    met = sorted(zip(np.minimum(left, right).tolist(), np.maximum(left, right).tolist(), strict=True))
    low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    meet = np.triu((low <= high).all(axis=2), 1)
    assert met == sorted(zip(*(v.tolist() for v in np.nonzero(meet)), strict=True))


@given(fields(), st.sampled_from(["iou", "ios"]), st.sampled_from([0.1, 0.5, 0.51, 1.0]))
def test_owners_suppression_and_joining_are_those_of_brute_force(field, metric, threshold):
    boxes, scores, labels = field
    order = np.argsort(-scores, kind="stable")
    expected = brute_owners(boxes, scores, labels, threshold, metric)
    assert greedy_match(boxes, order, labels, threshold=threshold, metric=metric).tolist() == expected.tolist()
    kept = suppress(boxes, scores, labels, threshold, metric)
    assert kept.tolist() == [i for i in order if expected[i] == i]
    group = np.array([min(np.flatnonzero(expected == o)) for o in expected], np.int64)
    for leader, hull in zip(*hull_groups(boxes, group), strict=True):
        mine = boxes[group == leader]
        assert hull.tolist() == [*mine[:, :2].min(axis=0), *mine[:, 2:].max(axis=0)]


@pytest.mark.parametrize("extent", [40, 400, 4000])
def test_thousands_of_boxes_as_torchvision_suppresses_them(extent):
    # Heaps of hundreds take the way of several rounds.
    rng = np.random.default_rng(1)
    boxes = rng.uniform(0, extent, (3000, 2)).repeat(2, axis=1)[:, [0, 2, 1, 3]]
    boxes[:, 2:] += rng.uniform(5, 40, (3000, 2))
    scores, labels = rng.permutation(3000) / 3000, rng.integers(0, 3, 3000)
    expected = torchvision.ops.batched_nms(
        torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels), iou_threshold=0.4
    )
    assert suppress(boxes, scores, labels, 0.4).tolist() == expected.tolist()


@pytest.mark.parametrize("metric", ["IOU", "IOS"])
def test_joining_is_that_of_sahi(metric):
    combine = pytest.importorskip("sahi.postprocess.combine", reason="SAHI is not installed")
    rng = np.random.default_rng(2)
    boxes = _boxes(rng, 800, 700, 60)
    scores = rng.permutation(800) / 800
    table = np.concatenate([boxes, scores[:, None], np.zeros((800, 1))], axis=1)
    owner = greedy_match(boxes, np.argsort(-scores, kind="stable"), np.zeros(800), threshold=0.5, metric=metric.lower())
    survivors = np.unique(owner)
    groups = combine.greedy_nmm(table, metric, 0.5)
    assert sorted(groups) == sorted(survivors.tolist())
    assert all(owner[taken] == survivor for survivor, many in groups.items() for taken in many)
