"""torchvision's Faster and Mask R-CNN as a Predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from models.engines.torchvision.network import DetectorArchitecture, MaskArchitecture, Pooling, build_detector
from models.geometry.boxes import clip_boxes, pixel_sized
from models.geometry.mask_pasting import paste_masks
from models.images.rendering import DEFAULT, Rendering
from models.instances import Instances
from models.runtime.devices import channels_last, library_versions, pick_device, to_device
from models.runtime.replay import MOST_PIXELS, Replayed
from models.runtime.timing import timed
from models.saved.checkpoints import build_fitting
from models.saved.spec import ModelSpec, parse_architecture
from models.tiling.settings import Tiling

KINDS: dict[str, type[DetectorArchitecture]] = {
    "detector": DetectorArchitecture,
    "instance_segmenter": MaskArchitecture,
}


def detector_spec(
    architecture: DetectorArchitecture,
    classes: Sequence[str],
    *,
    tiling: Tiling | None = None,
    rendering: Rendering = DEFAULT,
) -> ModelSpec:
    """The model.json of a torchvision detector; with a mask head it is an instance segmenter."""
    return ModelSpec(
        kind="instance_segmenter" if isinstance(architecture, MaskArchitecture) else "detector",
        engine="torchvision",
        architecture=architecture.model_dump(),
        classes=list(classes),
        versions=library_versions(),
        tiling=tiling,
        rendering=rendering,
    )


def load_detector(spec: ModelSpec, weights: Mapping[str, torch.Tensor], device: str) -> TorchvisionDetector:
    """Build the predictor of a saved torchvision detector.

    Raises:
        ModelError: wrong architecture fields or weights that do not fit.
    """
    architecture = parse_architecture(spec, KINDS[spec.kind])
    classes = len(spec.classes)
    model = build_fitting(lambda: build_detector(architecture, classes), weights, f"detector {architecture.backbone}")
    detector = TorchvisionDetector(without_norms(model.eval()), device)
    if detector.device != "cpu":
        replay_dense_layers(detector.model)
    return detector


def without_norms(model: nn.Module) -> nn.Module:
    """The network for prediction alone: each batch norm that follows a convolution is folded into its weights.

    Changes ``model``. Results differ by rounding; on 2 CPU cores a MobileNet detector's pass took 0.363 s instead of 0.378.
    """
    for module in list(model.modules()):
        children = list(module.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if type(conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, FrozenBatchNorm2d):
                _fold(conv, norm)
                setattr(module, name, nn.Identity())
    return model


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    with torch.no_grad():
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
        conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias, requires_grad=False)
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)


def guess_strides(predictor: Any) -> bool:
    """Let a predictor that has predicted nothing yet pool as releases up to 0.6.1 did: see `Pooling`.

    Returns:
        False where no torchvision network is in it, be it in tiles or a composition.
    """
    while not isinstance(predictor, TorchvisionDetector):
        predictor = getattr(predictor, "predictor", None) or getattr(predictor, "detector", None)
        if predictor is None:
            return False
    for module in predictor.model.modules():
        if isinstance(module, Pooling):
            module.guessing = True
    return True


class TorchvisionDetector:
    """Predictor over a torchvision detection network."""

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.device = pick_device(device)
        self.model = channels_last(model.to(self.device)).eval()

    @timed("forward")
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
            tensors = self.tensors([images[i] for i in group])
            for i, output in zip(group, on_host(self.model(tensors)), strict=True):
                results[i] = self._instances(str(i), images[i], output)
        return [r for r in results if r is not None]

    def tensors(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The network's inputs of RGB uint8 images of one size, float32 (3, H, W) in 0..1, on the device."""
        pixels = to_device(torch.from_numpy(together(images)), self.device).permute(0, 3, 1, 2)
        return list(pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255))

    @staticmethod
    def _instances(image_id: str, image: np.ndarray, output: Mapping[str, np.ndarray]) -> Instances:
        height, width = image.shape[:2]
        boxes = clip_boxes(output["boxes"], height, width)
        keep = pixel_sized(boxes)
        masks = None
        if "masks" in output:
            masks = paste_masks(output["masks"][keep, 0], boxes[keep], height, width)
        scores, labels = output["scores"][keep], output["labels"][keep] - 1
        return Instances.make(image_id, height, width, boxes[keep], scores, labels=labels, masks=masks)


def replay_dense_layers(model: Any) -> None:
    """Let a torchvision detector that is trained no more replay what has the image's shape alone; see `Replayed`.

    Its weights have other names after it.
    """
    model.backbone = Replayed(model.backbone)
    # The first of its inputs has stride 4 or more.
    model.rpn.head = Replayed(model.rpn.head, MOST_PIXELS // 4**2)


def together(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one size as one array (B, H, W, 3); a single one is not copied."""
    return np.stack(images) if len(images) > 1 else np.ascontiguousarray(images[0])[None]


def on_host(outputs: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, np.ndarray]]:
    """The outputs of a torchvision detector in the CPU's memory, floats as float32: one copy a kind, not one an image."""
    counts = [len(output["boxes"]) for output in outputs]
    parts = {}
    for name in outputs[0]:
        joined = torch.cat([output[name] for output in outputs])
        whole = (joined.float() if joined.is_floating_point() else joined).cpu().numpy()
        parts[name] = np.split(whole, np.cumsum(counts)[:-1])
    return [{name: part[place] for name, part in parts.items()} for place in range(len(outputs))]
