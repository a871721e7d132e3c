"""torchvision's Faster and Mask R-CNN with an FPN backbone chosen by name: settings and network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.engines.torchvision.batched import batched
from models.errors import ModelError
from models.saved.checkpoints import download_error, load_matching, read_checkpoint

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

Sizes = Annotated[list[Annotated[int, Field(ge=1, le=10_000)]], Field(max_length=20)]

# Images are padded to a multiple of it, in pixels.
DIVISOR = 32
# (masks, backbone, heads) -> torchvision's weights of the whole network, trained on COCO.
COCO_WEIGHTS = {
    (False, "resnet50", "v1"): "FasterRCNN_ResNet50_FPN_Weights",
    (False, "resnet50", "v2"): "FasterRCNN_ResNet50_FPN_V2_Weights",
    (False, "mobilenet_v3_large", "v1"): "FasterRCNN_MobileNet_V3_Large_FPN_Weights",
    (True, "resnet50", "v1"): "MaskRCNN_ResNet50_FPN_Weights",
    (True, "resnet50", "v2"): "MaskRCNN_ResNet50_FPN_V2_Weights",
}


class DetectorArchitecture(BaseModel):
    """Settings of the detector's layers and of its output."""

    model_config = ConfigDict(extra="forbid")

    backbone: Backbone = Field(default="resnet50", description="torchvision's network below the feature pyramid.")
    norm: Literal["batch", "frozen", "group"] = Field(
        default="frozen",
        description=(
            "Normalisation of the backbone: batch learns BatchNorm's statistics, frozen keeps those of the weights; group "
            "is GroupNorm in 32 groups, which has none and takes no ImageNet weights."
        ),
    )
    heads: Literal["v1", "v2"] = Field(
        default="v1",
        description=(
            "v2: heads of torchvision's fasterrcnn_resnet50_fpn_v2 and maskrcnn_resnet50_fpn_v2 (BatchNorm, deeper)."
        ),
    )
    trainable_stages: int = Field(
        default=3, ge=0, le=5, description="Stages of the backbone that are trained, from the last one."
    )
    levels: list[int] = Field(
        default=[1, 2, 3, 4],
        min_length=1,
        max_length=5,
        description=(
            "Stages of the backbone that the pyramid takes: 1 has stride 4, 4 has stride 32; for mobilenet the last ones "
            "of its strided stages."
        ),
    )
    pooled_level: bool = Field(default=True, description="Add a pooled map above the last level.")
    fpn_channels: int = Field(default=256, ge=8, le=1024, description="Channels of the feature pyramid.")
    head_channels: int = Field(default=1024, ge=8, le=4096, description="Channels of the box head.")
    anchor_sizes: Literal["auto"] | Annotated[list[Sizes], Field(max_length=10)] = Field(
        default=[[32], [64], [128], [256], [512]],
        description=(
            "Anchor sizes in pixels, one list for each feature map, the pooled one included; auto: three each, by k-means "
            "over the training planes."
        ),
    )
    aspect_ratios: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(max_length=20)] = Field(
        default=[0.5, 1.0, 2.0], description="Height over width of the anchors."
    )
    roi_batch_size: int = Field(
        default=512, ge=1, le=4096, description="Proposals per image that the box head is trained on."
    )
    proposals_before_nms: int = Field(default=2000, ge=1, le=20_000, description="Proposals per feature map before NMS.")
    proposals: int = Field(default=1000, ge=1, le=20_000, description="Proposals kept in prediction.")
    train_proposals: int = Field(
        default=2000,
        ge=1,
        le=20_000,
        description="Proposals kept in training; few make the sampled background the hard one, which short trainings need.",
    )
    min_size: int | None = Field(
        default=800,
        ge=32,
        le=20_000,
        description="Shorter side in pixels to which images are scaled; null keeps their own scale, times zoom.",
    )
    max_size: int = Field(default=1333, ge=32, le=20_000, description="Longest side in pixels after scaling.")
    zoom: float = Field(default=1.0, ge=0.1, le=8, description="Factor on the image's own scale where min_size is null.")
    score_threshold: float = Field(default=0.05, ge=0, le=1, description="Least score of a detection.")
    nms_threshold: float = Field(
        default=0.5, ge=0, le=1, description="IoU from which the weaker of two detections is dropped."
    )
    max_detections: int = Field(default=300, ge=1, le=10_000, description="Most detections per image.")


class MaskArchitecture(DetectorArchitecture):
    """A detector with a mask head of four convolutions (Mask R-CNN)."""

    mask_channels: int = Field(default=256, ge=8, le=1024, description="Channels of the mask head.")
    mask_size: Literal[28, 56] = Field(
        default=28,
        description="Side of a mask in cells before it is pasted; 56 is four times the head's work of 28.",
    )


def build_detector(architecture: DetectorArchitecture, classes: int, weights: str = "none") -> FasterRCNN:
    """Build the network: a MaskRCNN for a MaskArchitecture, else a FasterRCNN.

    In evaluation its masks are those of the boxes, float (N, 1, mask_size, mask_size), not pasted into images.

    Args:
        classes: number of classes without the background.
        weights: ``none``, ``imagenet`` (torchvision's backbone), ``coco`` (torchvision's
            whole network, where it has one) or a local folder, .safetensors, .pth or .pkl.

    Raises:
        ModelError: settings that do not fit together, weights absent or offline.
    """
    maps = len(architecture.levels) + architecture.pooled_level
    if architecture.anchor_sizes == "auto":
        raise ModelError("architecture.anchor_sizes: auto is found out by a training, a model has numbers")
    if len(architecture.anchor_sizes) != maps:
        raise ModelError(
            f"architecture.anchor_sizes: {len(architecture.anchor_sizes)} lists for {maps} feature maps "
            f"({len(architecture.levels)} levels{' + 1 pooled' if architecture.pooled_level else ''})"
        )
    if len({len(sizes) for sizes in architecture.anchor_sizes}) > 1:
        raise ModelError("architecture.anchor_sizes: every feature map needs the same number of sizes")
    components = {**_components(architecture, classes), **_sampling(architecture)}
    backbone = _backbone(architecture, weights == "imagenet")
    if isinstance(architecture, MaskArchitecture):
        model = MaskRCNN(backbone, **components, **_mask_components(architecture, classes))
    else:
        model = FasterRCNN(backbone, **components)
    old = model.transform
    model.transform = _Transform(old.min_size[-1], old.max_size, old.image_mean, old.image_std, size_divisible=DIVISOR)
    for component in (model.rpn, model.roi_heads):
        component.box_coder = _FullPrecision(component.box_coder.weights)
        batched(component)
    model.transform.zoom = architecture.zoom if architecture.min_size is None else None
    if weights == "coco":
        load_matching(model, _coco_weights(architecture), "coco")
    elif weights not in ("none", "imagenet"):
        load_matching(model, read_checkpoint(weights), weights)
    return model


def _components(architecture: DetectorArchitecture, classes: int) -> dict[str, nn.Module]:
    maps = len(architecture.anchor_sizes)
    channels, hidden = architecture.fpn_channels, architecture.head_channels
    anchors = AnchorGenerator(
        tuple(tuple(s) for s in architecture.anchor_sizes if not isinstance(s, str)),
        (tuple(architecture.aspect_ratios),) * maps,
    )
    components = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": Pooling(_map_names(architecture), output_size=7, sampling_ratio=2),
        "box_predictor": FastRCNNPredictor(hidden, classes + 1),
    }
    if architecture.heads == "v1":
        return {**components, "box_head": TwoMLPHead(channels * 49, hidden)}
    components["rpn_head"] = RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2)
    components["box_head"] = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], norm_layer=nn.BatchNorm2d)
    return components


def _mask_components(architecture: MaskArchitecture, classes: int) -> dict[str, nn.Module]:
    width = architecture.mask_channels
    norm = nn.BatchNorm2d if architecture.heads == "v2" else None
    return {
        "mask_roi_pool": Pooling(_map_names(architecture), output_size=architecture.mask_size // 2, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(architecture.fpn_channels, [width] * 4, 1, norm_layer=norm),
        "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
    }


def _map_names(architecture: DetectorArchitecture) -> list[str]:
    return [str(i) for i in range(len(architecture.levels))]


def _sampling(architecture: DetectorArchitecture) -> dict[str, float]:
    return {
        "box_batch_size_per_image": architecture.roi_batch_size,
        "rpn_pre_nms_top_n_train": architecture.proposals_before_nms,
        "rpn_pre_nms_top_n_test": architecture.proposals_before_nms,
        "rpn_post_nms_top_n_train": architecture.train_proposals,
        "rpn_post_nms_top_n_test": architecture.proposals,
        "box_score_thresh": architecture.score_threshold,
        "box_nms_thresh": architecture.nms_threshold,
        "box_detections_per_img": architecture.max_detections,
        "min_size": architecture.min_size or 32,
        "max_size": architecture.max_size,
    }


def _backbone(architecture: DetectorArchitecture, pretrained: bool) -> BackboneWithFPN:
    name = architecture.backbone
    if pretrained and architecture.norm == "group":
        raise ModelError("architecture.norm: ImageNet weights are for batch or frozen, not for group; use weights none")
    norm = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 32)}[architecture.norm]
    enum = "DEFAULT" if pretrained else None
    if architecture.norm == "group" and name.startswith("mobilenet"):
        raise ModelError(f"architecture.norm: group parts channels into 32, which {name}'s are not; use batch or frozen")
    try:
        body = torchvision.models.get_model(name, weights=enum, norm_layer=norm)
    except OSError as error:
        raise download_error(f"torchvision {name}", error) from error
    if name.startswith("mobilenet"):
        body = body.features
        stages = [0, *[i for i, b in enumerate(body) if getattr(b, "_is_cn", False)], len(body) - 1]
        layers = {i: str(stages[i]) for i in range(1, len(stages))}
        channels = {i: body[stages[i]].out_channels for i in layers}
        frozen = [body[i] for i in range(stages[max(0, len(stages) - 1 - architecture.trainable_stages)])]
    else:
        layers = {i: f"layer{i}" for i in range(1, 5)}
        channels = {i: (body.fc.in_features // 8) * 2 ** (i - 1) for i in layers}
        blocks = ["conv1", "layer1", "layer2", "layer3", "layer4"]
        frozen = [getattr(body, p) for p in blocks[: max(0, 5 - architecture.trainable_stages)]]
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
        norm_layer=nn.BatchNorm2d if architecture.heads == "v2" else None,
    )


class _Transform(GeneralizedRCNNTransform):
    """torchvision's scaling to a size, or with ``zoom`` set by a fixed factor; leaves masks in their boxes.

    Training windows are cut at that factor already. Masks pasted into large images would fill the memory.
    """

    zoom: float | None = None

    def resize(self, image, target=None):  # type: ignore[no-untyped-def]
        if self.zoom is None:
            return super().resize(image, target)
        if self.training or self.zoom == 1:
            return image, target
        height, width = (max(1, round(side * self.zoom)) for side in image.shape[-2:])
        # A single column comes out of torch 2.10 with its first row in place of all; a single row comes out right.
        turned = width == 1
        image, size = (image.mT, [width, height]) if turned else (image, [height, width])
        image = nn.functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        return image.mT if turned else image, target

    def postprocess(self, result, image_shapes, original_image_sizes):  # type: ignore[no-untyped-def]
        if self.training:
            return result
        masks = [detections.pop("masks", None) for detections in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        return [{**f, "masks": m} if m is not None else f for f, m in zip(result, masks, strict=True)]


class Pooling(MultiScaleRoIAlign):
    """Pools boxes from feature maps at the strides that these have, whatever size the first image has.

    torchvision takes the strides from the first batch, by its size before it is padded, and keeps them: after an image
    40 pixels high, padded to 64, all later ones would be pooled from other places.
    """

    # As releases up to 0.6.1 did, to see that a version gives what they logged.
    guessing = False

    def forward(self, x, boxes, image_shapes):  # type: ignore[no-untyped-def]
        """See `MultiScaleRoIAlign`; ``image_shapes`` are those before padding."""
        if self.guessing:
            return super().forward(x, boxes, image_shapes)
        padded = [tuple(-(-int(side) // DIVISOR) * DIVISOR for side in shape) for shape in image_shapes]
        return super().forward(x, boxes, padded)


class _FullPrecision(BoxCoder):
    """Computes boxes in float32 where the network runs in half precision: 16 bits place a border to a pixel or so."""

    def decode_single(self, rel_codes, boxes):  # type: ignore[no-untyped-def]
        return super().decode_single(rel_codes.float(), boxes.float())


class _NoExtraBlock(LastLevelMaxPool):
    """Leaves the feature maps as they are; torchvision pools one more when given None."""

    def forward(self, x, y, names):  # type: ignore[no-untyped-def]
        return x, names


def _coco_weights(architecture: DetectorArchitecture) -> Mapping[str, torch.Tensor]:
    masks = isinstance(architecture, MaskArchitecture)
    name = COCO_WEIGHTS.get((masks, architecture.backbone, architecture.heads))
    if name is None:
        known = ", ".join(f"{backbone} {heads}" for m, backbone, heads in COCO_WEIGHTS if m == masks)
        raise ModelError(
            f"weights coco: torchvision has none for {architecture.backbone} {architecture.heads}; it has {known}"
        )
    try:
        return torchvision.models.get_weight(f"{name}.DEFAULT").get_state_dict(progress=True)
    except OSError as error:
        raise download_error(f"torchvision {name}", error) from error
