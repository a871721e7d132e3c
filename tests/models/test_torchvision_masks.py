"""Mask R-CNN against torchvision's own: the same tensors, the same pixels."""

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.detection.roi_heads import paste_masks_in_image

from models.engines.torchvision.network import DetectorArchitecture, MaskArchitecture, build_detector
from models.engines.torchvision.predictor import TorchvisionDetector, detector_spec
from models.geometry.mask_pasting import paste_masks, sample_masks
from models.geometry.rle import rle_decode
from models.loading import load_model
from models.saved.folder import save_model


@pytest.mark.parametrize(
    ("builder", "kind", "heads"),
    [
        ("fasterrcnn_resnet50_fpn", DetectorArchitecture, "v1"),
        ("fasterrcnn_resnet50_fpn_v2", DetectorArchitecture, "v2"),
        ("maskrcnn_resnet50_fpn", MaskArchitecture, "v1"),
        ("maskrcnn_resnet50_fpn_v2", MaskArchitecture, "v2"),
    ],
)
def test_the_networks_are_torchvisions_own(builder, kind, heads):
    with torch.device("meta"):
        reference = getattr(torchvision.models.detection, builder)(weights=None, weights_backbone=None, num_classes=2)
        ours = build_detector(kind(heads=heads, norm="batch"), 1)
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in reference.state_dict().items()}


def test_masks_are_pasted_as_torchvision_pastes_them():
    rng = np.random.default_rng(0)
    height, width = 90, 120
    corners = rng.uniform(-3, [[width - 8, height - 8]], (40, 2)).clip(0)
    boxes = np.concatenate([corners, corners + rng.uniform(0.6, 60, (40, 2))], 1).astype(np.float32)
    boxes = torch.from_numpy(boxes.clip(0, [width, height, width, height]).astype(np.float32))
    masks = torch.from_numpy(rng.random((40, 1, 28, 28)).astype(np.float32))
    reference = paste_masks_in_image(masks, boxes, (height, width))[:, 0].numpy() >= 0.5
    ours = np.stack([rle_decode(m) for m in paste_masks(masks[:, 0].numpy(), boxes.numpy(), height, width)])
    assert (ours == reference).all()
    assert ours.any()
    assert paste_masks(masks[:0, 0].numpy(), boxes[:0].numpy(), height, width) == []


def test_masks_are_sampled_at_the_centres_of_pixels():
    """What Detectron2 does with torch's grid_sample over the whole image."""
    rng = np.random.default_rng(0)
    height, width = 50, 64
    corners = rng.uniform(0, [[width - 8, height - 8]], (30, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.6, 40, (30, 2))], 1).clip(0, [width, height, width, height])
    boxes = boxes.astype(np.float32)
    masks = rng.random((30, 28, 28)).astype(np.float32)
    ours = [rle_decode(m) for m in sample_masks(masks, boxes, height, width)]
    for mask, box, drawn in zip(masks, boxes.astype(np.float64), ours, strict=True):
        y = (torch.arange(height, dtype=torch.float64) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        x = (torch.arange(width, dtype=torch.float64) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
        sampled = torch.nn.functional.grid_sample(torch.from_numpy(mask).double()[None, None], grid, align_corners=False)
        assert (drawn == (sampled[0, 0].numpy() >= 0.5)).all()
    assert sum(drawn.any() for drawn in ours) > 20


def test_masks_of_a_huge_image_need_no_dense_memory(tmp_path):
    import resource

    small = {"backbone": "resnet18", "norm": "batch", "levels": [3], "pooled_level": False, "anchor_sizes": [[64]]}
    narrow = {"fpn_channels": 16, "head_channels": 16, "mask_channels": 16, "min_size": 128, "max_size": 128}
    architecture = MaskArchitecture(**small, **narrow, score_threshold=0.0, max_detections=60)
    torch.manual_seed(0)
    folder = save_model(
        tmp_path / "m", detector_spec(architecture, ["plane"]), build_detector(architecture, 1).state_dict()
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8).repeat(50, 0).repeat(50, 1)
    instances = load_model(folder).predict([image])[0]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert len(instances) >= 30
    # All masks dense, as floats: 30 x 3,200 x 3,200 x 4 bytes = 1.2 GB.
    assert grown < 0.6, grown


def test_a_detection_without_area_takes_its_mask_with_it():
    masks = np.ones((3, 1, 28, 28), np.float32)
    masks[2] = 0
    output = {
        "boxes": np.array([[5, 5, 5, 9], [10, 10, 20, 20], [30, 30, 40, 44]], np.float32),
        "scores": np.array([0.9, 0.8, 0.7], np.float32),
        "labels": np.array([1, 2, 3]),
        "masks": masks,
    }
    instances = TorchvisionDetector._instances("a", np.zeros((50, 60, 3), np.uint8), output)
    assert instances.labels.tolist() == [1, 2]
    assert [bool(rle_decode(mask).any()) for mask in instances.masks] == [True, False]


def test_masks_of_56_cells_are_learnt_and_pasted(tmp_path):
    small = {"backbone": "resnet18", "norm": "batch", "levels": [3], "pooled_level": False, "anchor_sizes": [[64]]}
    narrow = {"fpn_channels": 16, "head_channels": 16, "mask_channels": 8, "min_size": 64, "max_size": 64, "mask_size": 56}
    torch.manual_seed(0)
    architecture = MaskArchitecture(**small, **narrow, score_threshold=0.0)
    network = build_detector(architecture, 1)
    asked = []
    network.roi_heads.mask_predictor.register_forward_hook(lambda _, __, logits: asked.append(tuple(logits.shape)[1:]))
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
    target["masks"][0, 8:44, 20:24] = 1
    losses = network.train()([torch.rand(3, 64, 64)], [target])
    losses["loss_mask"].backward()
    folder = save_model(tmp_path / "m", detector_spec(architecture, ["plane"]), network.state_dict())
    loaded = load_model(folder)
    assert loaded.predict([np.zeros((64, 64, 3), np.uint8)])[0].masks is not None
    assert asked == [(2, 56, 56)]
