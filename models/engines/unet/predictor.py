"""Segmentation of a plane inside its box crop: the U-Net family of smp and the course's SkipNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from models.errors import ModelError, one_line
from models.geometry.boxes import crop_window
from models.geometry.rle import CropMask, rle_boxes, rle_encode, rle_paste
from models.images.rendering import DEFAULT, Rendering
from models.instances import RLE, Instances
from models.runtime.devices import channels_last, library_versions, pick_device, to_device
from models.runtime.timing import timed
from models.saved.checkpoints import build_fitting, download_error, load_matching, read_checkpoint
from models.saved.spec import ModelSpec, parse_architecture

# ImageNet statistics, which the encoders' pretrained weights expect.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

# Crops per forward pass. Measured on 2 CPU cores, 100 crops of 128 pixels, alternating, one by one against
# batches: of 4 1.40 times as long, of 8 1.61, of 12 1.71, of 16 1.57, of 32 1.45 (the caches). A GPU wants more.
CPU_BATCH, GPU_BATCH = 12, 128


class SegmenterArchitecture(BaseModel):
    """Everything that decides the network and how a crop becomes a mask."""

    model_config = ConfigDict(extra="forbid")

    network: str = Field(
        default="unet",
        max_length=100,
        description=(
            "skipnet, or an architecture of segmentation-models-pytorch such as unet, unetplusplus, fpn, deeplabv3plus."
        ),
    )
    encoder: str = Field(default="resnet18", max_length=100, description="Encoder of segmentation-models-pytorch.")
    decoder_channels: list[Annotated[int, Field(ge=1, le=4096)]] | None = Field(
        default=None, max_length=10, description="Its parameter of that name, for architectures that have it."
    )
    crop_size: int = Field(
        default=128, ge=32, le=1024, multiple_of=32, description="Side in pixels to which a crop is resized."
    )
    margin: float = Field(default=0.0, ge=0, le=1, description="Share of the box added on each side.")
    threshold: float = Field(default=0.5, gt=0, lt=1, description="Least probability of a pixel of the mask.")
    flips: bool = Field(default=False, description="Average the probabilities over the four mirror images.")
    normalisation: Literal["imagenet", "crop"] = Field(
        default="imagenet",
        description=(
            "By ImageNet's statistics, as pretrained encoders expect, or by each crop's own mean and deviation, which "
            "makes dark and pale planes alike."
        ),
    )

    @property
    def engine(self) -> Literal["smp", "skipnet"]:
        """Which library builds the network."""
        return "skipnet" if self.network == "skipnet" else "smp"


def build_segmenter(architecture: SegmenterArchitecture, weights: str = "none") -> nn.Module:
    """Build the network: (B, 3, S, S) normalised to logits (B, 1, S, S).

    Args:
        weights: ``none``, a name that smp knows as ``encoder_weights`` of the encoder
            (``imagenet``, ...), or a local folder, .safetensors or .pth.

    Raises:
        ModelError: unknown network, encoder or weights.
    """
    if architecture.network == "skipnet":
        if architecture.crop_size % 64:
            raise ModelError(f"architecture.crop_size: skipnet needs a multiple of 64, not {architecture.crop_size}")
        from models.engines.unet.skipnet import SkipNet

        model: nn.Module = SkipNet()
        if weights != "none":
            load_matching(model, read_checkpoint(weights), weights)
        return model
    return _smp_network(architecture, weights)


def _smp_network(architecture: SegmenterArchitecture, weights: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    local = "/" in weights or weights.endswith((".pth", ".safetensors"))
    more = {"decoder_channels": tuple(architecture.decoder_channels)} if architecture.decoder_channels else {}
    try:
        model = smp.create_model(
            architecture.network.lower(),
            encoder_name=architecture.encoder,
            encoder_weights=None if local or weights == "none" else weights,
            in_channels=3,
            classes=1,
            **more,
        )
    except (OSError, RuntimeError) as error:
        raise download_error(f"{architecture.encoder} ({weights})", error) from error
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"architecture: {one_line(error, 400)}") from error
    if local:
        load_matching(model, read_checkpoint(weights), weights)
    return model


def segmenter_spec(
    architecture: SegmenterArchitecture, classes: Sequence[str], rendering: Rendering = DEFAULT
) -> ModelSpec:
    """The model.json of a crop segmenter."""
    return ModelSpec(
        kind="segmenter",
        engine=architecture.engine,
        architecture=architecture.model_dump(),
        classes=list(classes),
        versions=library_versions(),
        rendering=rendering,
    )


def load_segmenter(spec: ModelSpec, weights: Mapping[str, torch.Tensor], device: str) -> CropSegmenter:
    """Build the predictor of a saved crop segmenter.

    Raises:
        ModelError: wrong architecture fields or weights that do not fit.
    """
    architecture = parse_architecture(spec, SegmenterArchitecture)
    model = build_fitting(lambda: build_segmenter(architecture), weights, f"segmenter {architecture.network}")
    return CropSegmenter(model, architecture, device)


def normalise(crops: np.ndarray, by: Literal["imagenet", "crop"] = "imagenet") -> torch.Tensor:
    """RGB uint8 crops (B, S, S, 3) to the network's input, float32 (B, 3, S, S) in channels-last memory."""
    scaled = crops.astype(np.float32) / 255
    if by == "imagenet":
        scaled = (scaled - MEAN) / STD
    else:
        mean = scaled.mean(axis=(1, 2, 3), keepdims=True)
        scaled = (scaled - mean) / (scaled.std(axis=(1, 2, 3), keepdims=True) + np.float32(0.02))
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)


class CropSegmenter:
    """Segments the plane in a crop; as a Predictor it takes each image as one crop."""

    def __init__(self, model: nn.Module, architecture: SegmenterArchitecture, device: str = "cpu") -> None:
        self.device = pick_device(device)
        self.architecture = architecture
        self.batch = CPU_BATCH if self.device == "cpu" else GPU_BATCH
        self.model = channels_last(model.to(self.device)).eval()

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Each RGB uint8 image is one plane's crop: at most one instance, score its mean mask probability."""
        results = []
        for i, probability in enumerate(self.segment(images)):
            height, width = probability.shape
            mask = probability >= self.architecture.threshold
            if not mask.any():
                results.append(Instances.empty(str(i), height, width, masks=True))
                continue
            rle = rle_encode(mask)
            score = float(probability[mask].mean())
            results.append(Instances.make(str(i), height, width, rle_boxes([rle]), [score], labels=[0], masks=[rle]))
        return results

    @timed("forward")
    def segment(self, crops: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Plane probability of each RGB uint8 crop (h, w, 3), float32 (h, w), in large batches."""
        size = self.architecture.crop_size
        results: list[np.ndarray] = []
        for start in range(0, len(crops), self.batch):
            batch = crops[start : start + self.batch]
            resized = np.stack([_resize(c, size, size) for c in batch])
            probabilities = self._forward(normalise(resized, self.architecture.normalisation))
            for crop, probability in zip(batch, probabilities, strict=True):
                results.append(_resize(probability, *crop.shape[:2]))
        return results

    def masks_in_boxes(self, images: Sequence[np.ndarray], boxes: Sequence[Any]) -> list[list[RLE]]:
        """One mask per box: ``boxes[i]`` is xyxy (N_i, 4) in ``images[i]``; RLE of the image's size, in order."""
        return [
            [rle_paste(c.mask, c.left, c.top, *image.shape[:2]) for c in of_image]
            for image, of_image in zip(images, self.crop_masks(images, boxes), strict=True)
        ]

    def crop_masks(self, images: Sequence[np.ndarray], boxes: Sequence[Any]) -> list[list[CropMask]]:
        """As `masks_in_boxes`, each mask in its own crop; crops of all images share the batches."""
        windows = [
            [crop_window(box, image.shape[0], image.shape[1], self.architecture.margin) for box in of_image]
            for image, of_image in zip(images, boxes, strict=True)
        ]
        crops = [image[y1:y2, x1:x2] for image, ws in zip(images, windows, strict=True) for x1, y1, x2, y2 in ws]
        probabilities = iter(self.segment(crops))
        threshold = self.architecture.threshold
        return [[CropMask(next(probabilities) >= threshold, x1, y1) for x1, y1, _, _ in ws] for ws in windows]

    @torch.inference_mode()
    def _forward(self, batch: torch.Tensor) -> np.ndarray:
        batch = to_device(batch, self.device)
        total = torch.sigmoid(self.model(batch))
        if self.architecture.flips:
            for dims in ((2,), (3,), (2, 3)):
                total = total + torch.sigmoid(self.model(batch.flip(dims))).flip(dims)
            total = total / 4
        return total[:, 0].float().cpu().numpy()


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = image.shape[0] > height and image.shape[1] > width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
