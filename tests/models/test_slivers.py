"""What is less than a pixel wide or high, as networks report it at the borders of tiles, is no detection."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.engines.detectron2.predictor import Detectron2Predictor
from models.engines.openvino.predictor import TwinDetector
from models.engines.openvino.settings import ImageInput
from models.engines.torchvision.predictor import TorchvisionDetector
from models.geometry.rle import rle_decode, rle_encode
from models.instances import Instances
from models.tiling.merging import TileResult, merge_tiles
from models.tiling.settings import Tiling

IMAGE = np.zeros((50, 60, 3), np.uint8)
# A sliver at the lower border, one at the right one that reaches beyond it, and planes of a pixel and more.
BOXES = np.array([[5, 49.2, 40, 50], [59.5, 3, 75, 30], [7, 8, 8, 9], [10, 10, 20, 20]], np.float32)
SCORES = np.array([0.9, 0.8, 0.7, 0.6], np.float32)


def _torchvision(masks):
    output = {"boxes": BOXES, "scores": SCORES, "labels": np.ones(4, np.int64), "masks": masks}
    return TorchvisionDetector._instances("a", IMAGE, output)


def _twin(masks):
    def network(pixels, size, at_a_time):
        return BOXES, SCORES, np.zeros(4, np.int64), masks

    network.streams = 1
    return TwinDetector(network, ImageInput(zoom=1, mean=[0, 0, 0], std=[1, 1, 1]), 1).predict([IMAGE])[0]


def _detectron2(masks):
    output = SimpleNamespace(
        pred_boxes=SimpleNamespace(tensor=torch.from_numpy(BOXES)),
        scores=torch.from_numpy(SCORES),
        pred_classes=torch.zeros(4, dtype=torch.int64),
    )
    dense = [np.full(IMAGE.shape[:2], mask.max() > 0) for mask in masks]
    return Detectron2Predictor._instances("a", *IMAGE.shape[:2], output, [rle_encode(m) for m in dense])


@pytest.mark.parametrize("engine", [_torchvision, _twin, _detectron2])
def test_detections_of_less_than_a_pixel_are_left_out_with_their_masks(engine):
    masks = np.zeros((4, 1, 28, 28), np.float32)
    masks[3] = 1
    instances = engine(masks)
    np.testing.assert_allclose(instances.boxes, BOXES[2:])
    np.testing.assert_allclose(instances.scores, SCORES[2:])
    assert [bool(rle_decode(mask).any()) for mask in instances.masks] == [False, True]


def test_what_a_small_tile_shows_of_less_than_a_pixel_is_left_out():
    """A tile at twice the scale may show a pixel of what is half a pixel in the image."""
    found = Instances.make("0", 64, 64, [[8, 8, 8.5, 30], [20, 20, 40, 40]], [0.9, 0.8], labels=[0, 0])
    merged = merge_tiles("0", 64, 64, [TileResult(found, (0, 0, 64, 64))], tiling=Tiling(size=64))
    assert merged.boxes.tolist() == [[20, 20, 40, 40]]
