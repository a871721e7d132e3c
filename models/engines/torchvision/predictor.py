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
from models.geometry.boxes import clip_boxes
from models.geometry.mask_pasting import paste_masks
from models.images.rendering import DEFAULT, Rendering
from models.instances import Instances
from models.runtime.devices import channels_last, library_versions, pick_device, to_device
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
    return TorchvisionDetector(without_norms(model.eval()), device)


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
            tensors = [self.tensor(images[i]) for i in group]
            for i, output in zip(group, self.model(tensors), strict=True):
                results[i] = self._instances(str(i), images[i], output)
        return [r for r in results if r is not None]

    def tensor(self, image: np.ndarray) -> torch.Tensor:
        """The network's input of an RGB uint8 image, float32 (3, H, W) in 0..1, on the device."""
        pixels = to_device(torch.from_numpy(np.ascontiguousarray(image)), self.device).permute(2, 0, 1)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)

    @staticmethod
    def _instances(image_id: str, image: np.ndarray, output: Mapping[str, torch.Tensor]) -> Instances:
        height, width = image.shape[:2]
        boxes = clip_boxes(output["boxes"].float().cpu().numpy(), height, width)
        keep = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        scores = output["scores"].float().cpu().numpy()
        labels = output["labels"].cpu().numpy() - 1
        masks = None
        if "masks" in output:
            masks = paste_masks(output["masks"][keep, 0].float().cpu().numpy(), boxes[keep], height, width)
        return Instances.make(image_id, height, width, boxes[keep], scores[keep], labels=labels[keep], masks=masks)
