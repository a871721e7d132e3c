"""torchvision's Faster R-CNN with an FPN backbone chosen by name, as a Predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.errors import ModelError
from models.geometry import clip_boxes
from models.instances import Instances
from models.predictor import ModelSpec, parse_architecture
from models.torch_tools import (
    channels_last,
    download_error,
    library_versions,
    load_matching,
    load_strict,
    pick_device,
    read_checkpoint,
)

Backbone = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
]

COCO_WEIGHTS = {
    "resnet50": "FasterRCNN_ResNet50_FPN_Weights",
    "mobilenet_v3_large": "FasterRCNN_MobileNet_V3_Large_FPN_Weights",
}


class DetectorArchitecture(BaseModel):
    """Everything that decides the detector's layers and what it returns.

    ``levels`` are backbone stages (1 = stride 4 ... 4 = stride 32; for mobilenet the
    last ones of its strided stages); ``anchor_sizes`` has one list of pixels per
    feature map, the extra pooled one included; ``train_proposals`` are kept in training:
    few of them make the sampled background the hard one, which short trainings need;
    ``min_size`` null keeps the image's own scale, times ``zoom``.
    """

    model_config = ConfigDict(extra="forbid")

    backbone: Backbone = "resnet50"
    norm: Literal["batch", "frozen"] = "frozen"
    trainable_stages: int = Field(default=3, ge=0, le=5)
    levels: list[int] = Field(default=[1, 2, 3, 4], min_length=1, max_length=5)
    pooled_level: bool = True
    fpn_channels: int = Field(default=256, ge=8, le=1024)
    head_channels: int = Field(default=1024, ge=8, le=4096)
    anchor_sizes: list[list[int]] = [[32], [64], [128], [256], [512]]
    aspect_ratios: list[float] = [0.5, 1.0, 2.0]
    roi_batch_size: int = Field(default=512, ge=1, le=4096)
    proposals_before_nms: int = Field(default=2000, ge=1, le=20_000)
    proposals: int = Field(default=1000, ge=1, le=20_000)
    train_proposals: int = Field(default=2000, ge=1, le=20_000)
    min_size: int | None = Field(default=800, ge=32, le=20_000)
    max_size: int = Field(default=1333, ge=32, le=20_000)
    zoom: float = Field(default=1.0, ge=0.1, le=8)
    score_threshold: float = Field(default=0.05, ge=0, le=1)
    nms_threshold: float = Field(default=0.5, ge=0, le=1)
    max_detections: int = Field(default=300, ge=1, le=10_000)


def build_detector(architecture: DetectorArchitecture, classes: int, weights: str = "none") -> FasterRCNN:
    """Build the network.

    Args:
        classes: number of classes without the background.
        weights: ``none``, ``imagenet`` (torchvision's backbone), ``coco`` (torchvision's
            whole detector, where it has one) or a local folder, .safetensors or .pth.

    Raises:
        ModelError: settings that do not fit together, weights absent or offline.
    """
    backbone = _backbone(architecture, weights == "imagenet")
    maps = len(architecture.levels) + architecture.pooled_level
    if len(architecture.anchor_sizes) != maps:
        raise ModelError(
            f"architecture.anchor_sizes: {len(architecture.anchor_sizes)} lists for {maps} feature maps "
            f"({len(architecture.levels)} levels{' + 1 pooled' if architecture.pooled_level else ''})"
        )
    if len({len(sizes) for sizes in architecture.anchor_sizes}) > 1:
        raise ModelError("architecture.anchor_sizes: every feature map needs the same number of sizes")
    names = [str(i) for i in range(len(architecture.levels))]
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple(tuple(s) for s in architecture.anchor_sizes), (tuple(architecture.aspect_ratios),) * maps
        ),
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(architecture.fpn_channels * 49, architecture.head_channels),
        box_predictor=FastRCNNPredictor(architecture.head_channels, classes + 1),
        box_batch_size_per_image=architecture.roi_batch_size,
        rpn_pre_nms_top_n_train=architecture.proposals_before_nms,
        rpn_pre_nms_top_n_test=architecture.proposals_before_nms,
        rpn_post_nms_top_n_train=architecture.train_proposals,
        rpn_post_nms_top_n_test=architecture.proposals,
        box_score_thresh=architecture.score_threshold,
        box_nms_thresh=architecture.nms_threshold,
        box_detections_per_img=architecture.max_detections,
        min_size=architecture.min_size or 32,
        max_size=architecture.max_size,
    )
    if architecture.min_size is None:
        old = model.transform
        model.transform = _OwnScale(old.min_size[-1], old.max_size, old.image_mean, old.image_std)
        model.transform.zoom = architecture.zoom
    if weights == "coco":
        load_matching(model, _coco_weights(architecture.backbone), "coco")
    elif weights not in ("none", "imagenet"):
        load_matching(model, read_checkpoint(weights), weights)
    return model


def _backbone(architecture: DetectorArchitecture, pretrained: bool) -> BackboneWithFPN:
    name = architecture.backbone
    norm = FrozenBatchNorm2d if architecture.norm == "frozen" else nn.BatchNorm2d
    enum = "DEFAULT" if pretrained else None
    try:
        body = torchvision.models.get_model(name, weights=enum, norm_layer=norm)
    except OSError as error:
        raise download_error(f"torchvision {name}", error) from None
    if name.startswith("mobilenet"):
        body = body.features
        stages = [0, *[i for i, b in enumerate(body) if getattr(b, "_is_cn", False)], len(body) - 1]
        layers = {i: str(stages[i]) for i in range(1, len(stages))}
        channels = {i: body[stages[i]].out_channels for i in layers}
        frozen = [body[i] for i in range(stages[max(0, len(stages) - 1 - architecture.trainable_stages)])]
    else:
        layers = {i: f"layer{i}" for i in range(1, 5)}
        channels = {i: (body.fc.in_features // 8) * 2 ** (i - 1) for i in layers}
        parts = ["conv1", "layer1", "layer2", "layer3", "layer4"]
        frozen = [getattr(body, p) for p in parts[: max(0, 5 - architecture.trainable_stages)]]
    missing = [level for level in architecture.levels if level not in layers]
    if missing:
        raise ModelError(f"architecture.levels: {name} has {sorted(layers)}, not {missing[0]}")
    for module in frozen:
        module.requires_grad_(False)
    return BackboneWithFPN(
        body,
        {layers[level]: str(i) for i, level in enumerate(architecture.levels)},
        [channels[level] for level in architecture.levels],
        architecture.fpn_channels,
        extra_blocks=LastLevelMaxPool() if architecture.pooled_level else _NoExtraBlock(),
    )


class _OwnScale(GeneralizedRCNNTransform):
    """Scales by a fixed factor instead of to a fixed size; training windows are cut at that scale already."""

    zoom: float = 1.0

    def resize(self, image, target=None):  # type: ignore[no-untyped-def]
        if self.training or self.zoom == 1:
            return image, target
        size = [max(1, round(side * self.zoom)) for side in image.shape[-2:]]
        return nn.functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0], target


class _NoExtraBlock(LastLevelMaxPool):
    """Leaves the feature maps as they are; torchvision pools one more when given None."""

    def forward(self, x, y, names):  # type: ignore[no-untyped-def]
        return x, names


def _coco_weights(backbone: str) -> Mapping[str, torch.Tensor]:
    if backbone not in COCO_WEIGHTS:
        raise ModelError(f"weights coco: torchvision has none for {backbone}; it has {', '.join(COCO_WEIGHTS)}")
    try:
        return torchvision.models.get_weight(f"{COCO_WEIGHTS[backbone]}.DEFAULT").get_state_dict(progress=True)
    except OSError as error:
        raise download_error(f"torchvision Faster R-CNN {backbone}", error) from None


def detector_spec(architecture: DetectorArchitecture, classes: Sequence[str]) -> ModelSpec:
    """The model.json of a torchvision detector."""
    return ModelSpec(
        kind="detector",
        engine="torchvision",
        architecture=architecture.model_dump(),
        classes=list(classes),
        versions=library_versions(),
    )


def load_detector(spec: ModelSpec, weights: Mapping[str, torch.Tensor], device: str) -> TorchvisionDetector:
    """Build the predictor of a saved torchvision detector.

    Raises:
        ModelError: wrong architecture fields or weights that do not fit.
    """
    architecture = parse_architecture(spec, DetectorArchitecture)
    model = build_detector(architecture, len(spec.classes))
    load_strict(model, weights, f"detector {architecture.backbone}")
    return TorchvisionDetector(model, device)


class TorchvisionDetector:
    """Predictor over a torchvision detection network."""

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.device = pick_device(device)
        self.model = channels_last(model.to(self.device)).eval()

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Detect planes in RGB uint8 images of any sizes; see `Predictor`.

        Images of one size go through the network together, others apart: padding a
        batch to a common size would change the predictions near the borders.
        """
        results: list[Instances | None] = [None] * len(images)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        for group in by_size.values():
            tensors = [self._tensor(images[i]) for i in group]
            for i, output in zip(group, self.model(tensors), strict=True):
                results[i] = self._instances(str(i), images[i], output)
        return [r for r in results if r is not None]

    def _tensor(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(self.device).float() / 255

    @staticmethod
    def _instances(image_id: str, image: np.ndarray, output: Mapping[str, torch.Tensor]) -> Instances:
        height, width = image.shape[:2]
        boxes = clip_boxes(output["boxes"].float().cpu().numpy(), height, width)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        scores = output["scores"].float().cpu().numpy()
        labels = output["labels"].cpu().numpy() - 1
        return Instances.make(image_id, height, width, boxes[keep], scores[keep], labels[keep])
