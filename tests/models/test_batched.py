"""A batch filtered at once gives what torchvision gives image by image."""

import pytest
import torch
from torchvision.ops import nms

from models.engines.torchvision import batched
from models.engines.torchvision.network import DetectorArchitecture, MaskArchitecture, build_detector

SMALL = {
    "backbone": "resnet18",
    "norm": "batch",
    "levels": [2, 3],
    "pooled_level": False,
    "fpn_channels": 32,
    "head_channels": 64,
    "anchor_sizes": [[24, 36, 54], [80, 120, 180]],
    "proposals_before_nms": 300,
    "proposals": 120,
    "min_size": None,
    "score_threshold": 0.01,
    "max_detections": 20,
}


@pytest.fixture
def at_once(monkeypatch):
    """Lets a CPU take the way that is a GPU's."""

    def switch(on):
        for kind in (batched.BatchedProposals, batched.BatchedDetections):
            monkeypatch.setattr(kind, "devices", ("cpu", "cuda") if on else ())

    return switch


def boxes_of(generator, *shape, side=200.0):
    corners = torch.rand(*shape, 2, generator=generator) * side
    return torch.cat([corners, corners + torch.rand(*shape, 2, generator=generator) * side / 2], -1)


@pytest.mark.parametrize(("seed", "number"), [(0, 1), (1, 2), (2, 7), (3, 60), (4, 300)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_keeps_what_torchvision_keeps(seed, number, threshold):
    generator = torch.Generator().manual_seed(seed)
    boxes = boxes_of(generator, 5, number)
    valid = torch.rand(5, number, generator=generator) > 0.2
    valid[3] = False
    kept = batched.suppressed(boxes, valid, threshold)
    scores = torch.arange(number, 0, -1, dtype=torch.float32)
    for group in range(5):
        at = valid[group].nonzero()[:, 0]
        expected = torch.zeros(number, dtype=torch.bool)
        expected[at[nms(boxes[group, at], scores[at], threshold)]] = True
        assert torch.equal(kept[group], expected)


def test_suppression_follows_a_chain_to_its_end():
    # Each box overlaps its neighbours alone: every other one is kept, and whether one is, hangs on all before it.
    left = torch.arange(101, dtype=torch.float32) * 6
    boxes = torch.stack([left, torch.zeros(101), left + 10, torch.full((101,), 10.0)], -1)
    kept = batched.suppressed(boxes[None], torch.ones(1, 101, dtype=torch.bool), 0.2)[0]
    assert torch.equal(kept, torch.arange(101) % 2 == 0)


def test_suppression_in_parts_is_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    boxes, valid = boxes_of(generator, 7, 50), torch.ones(7, 50, dtype=torch.bool)
    whole = batched.suppressed(boxes, valid, 0.3)
    monkeypatch.setattr(batched, "MOST_PAIRS", 2 * 50**2)
    assert torch.equal(batched.suppressed(boxes, valid, 0.3), whole)


def test_boxes_without_area_do_not_suppress():
    boxes = torch.tensor([[[5.0, 5, 5, 9], [5, 5, 5, 9], [5, 5, 9, 9]]])
    assert batched.suppressed(boxes, torch.ones(1, 3, dtype=torch.bool), 0.0).all()


@pytest.mark.parametrize("kind", [DetectorArchitecture, MaskArchitecture])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("sizes", [[(160, 224)] * 3, [(160, 224), (96, 320), (70, 65)]])
def test_a_batch_is_predicted_as_by_torchvision(at_once, kind, classes, sizes):
    torch.manual_seed(classes)
    more = {"mask_channels": 8} if kind is MaskArchitecture else {}
    model = build_detector(kind(**SMALL, **more), classes).eval()
    with torch.no_grad():
        # Random weights score all boxes alike: spread them.
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(5)
        model.rpn.head.cls_logits.weight.mul_(20)
    generator = torch.Generator().manual_seed(5)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    results = []
    for on in (False, True):
        at_once(on)
        with torch.inference_mode():
            results.append(model(images))
    assert sum(len(theirs["boxes"]) for theirs in results[0]) > 10
    for theirs, ours in zip(*results, strict=True):
        assert theirs.keys() == ours.keys()
        assert torch.equal(ours["labels"], theirs["labels"])
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


def test_proposals_are_those_of_torchvision(at_once):
    model = build_detector(DetectorArchitecture(**SMALL), 1).eval()
    generator = torch.Generator().manual_seed(1)
    counts = [500, 90]
    boxes = boxes_of(generator, 4, 590)
    # Some have no area, some lie outside.
    boxes[:, ::17, 2] = boxes[:, ::17, 0]
    boxes[:, 1::13] += 400
    # Steep scores, of which many become exactly 1 under the sigmoid.
    objectness = torch.randn(4, 590, generator=generator) * 12
    shapes = [(180, 230), (200, 200), (230, 180), (40, 40)]
    found = []
    for on in (False, True):
        at_once(on)
        found.append(model.rpn.filter_proposals(boxes, objectness, shapes, counts))
    for theirs, ours in zip(*found, strict=True):
        assert [len(t) for t in theirs] == [len(o) for o in ours]
        assert all(torch.equal(t, o) for t, o in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("numbers", [[0, 0], [0, 40], [40, 3, 0]])
def test_images_without_proposals_or_detections(at_once, numbers):
    heads = build_detector(DetectorArchitecture(**SMALL), 2).eval().roi_heads
    generator = torch.Generator().manual_seed(2)
    total = sum(numbers)
    logits = torch.randn(total, 3, generator=generator) * 4
    # Nothing but background in the first image that has any.
    first = next((n for n in numbers if n), 0)
    logits[:first, 0] += 100
    deltas = torch.randn(total, 12, generator=generator)
    # Of some boxes next to no width is left.
    deltas[::5, [6, 10]] = -100
    proposals = [boxes_of(generator, n, side=90.0) for n in numbers]
    found = []
    for on in (False, True):
        at_once(on)
        found.append(heads.postprocess_detections(logits, deltas, proposals, [(100, 120)] * len(numbers)))
    for theirs, ours in zip(*found, strict=True):
        assert [t.shape for t in theirs] == [o.shape for o in ours]
        for t, o in zip(theirs, ours, strict=True):
            assert t.dtype == o.dtype
            torch.testing.assert_close(o, t, rtol=0, atol=1e-5)


def test_training_takes_torchvisions_way(at_once, monkeypatch):
    at_once(True)
    monkeypatch.setattr(batched, "suppressed", None)
    model = build_detector(DetectorArchitecture(**SMALL, train_proposals=50, roi_batch_size=16), 1).train()
    target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    assert model([torch.rand(3, 128, 128)] * 2, [target] * 2)["loss_objectness"] > 0


def test_too_many_proposals_take_torchvisions_way(at_once, monkeypatch):
    at_once(True)
    model = build_detector(DetectorArchitecture(**SMALL), 1).eval()
    images = [torch.rand(3, 128, 128)] * 2
    with torch.inference_mode():
        expected = model(images)
        monkeypatch.setattr(batched, "MOST_PAIRS", 100)
        monkeypatch.setattr(batched, "suppressed", None)
        for theirs, ours in zip(expected, model(images), strict=True):
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("on", "images"), [(False, 3), (True, 1)])
def test_a_cpu_and_a_single_image_take_torchvisions_way(on, images, at_once, monkeypatch):
    at_once(on)
    monkeypatch.setattr(batched, "suppressed", None)
    build_detector(DetectorArchitecture(**SMALL), 1).eval()([torch.rand(3, 128, 128)] * images)
