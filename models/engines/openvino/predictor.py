"""Predictors over converted networks: what they were converted from, with the same predictions; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from models.engines.openvino.inputs import prepared
from models.engines.openvino.network import Network
from models.engines.openvino.settings import ImageInput, TwinArchitecture
from models.engines.unet.crops import CPU_BATCH, CropSegmenter
from models.engines.unet.settings import CropSettings
from models.errors import ModelError
from models.geometry.boxes import clip_boxes, pixel_sized
from models.geometry.mask_pasting import paste_masks, sample_masks
from models.instances import Instances
from models.predictor import Predictor
from models.runtime.timing import timed
from models.saved.spec import ModelSpec, parse_architecture


def load_twin(spec: ModelSpec, folder: Path, tile: int | None = None) -> Predictor:
    """Build the predictor of a saved twin.

    Args:
        spec: of the twin.
        folder: where it is saved.
        tile: side in pixels of the tiles that it will be given; None for images of any sizes.

    Raises:
        EngineMissing: OpenVINO is not installed.
        ModelError: wrong fields, a damaged network, or one of another kind; a precision that this CPU lacks.
    """
    architecture = parse_architecture(spec, TwinArchitecture)
    if spec.kind == "segmenter":
        if architecture.crop is None:
            raise ModelError(f"{folder}: architecture.crop: a segmenter needs it")
        return TwinSegmenter(Network(folder, architecture.precision, [("f32", 4)], [3]), architecture.crop)
    if architecture.image is None:
        raise ModelError(f"{folder}: architecture.image: a {spec.kind} needs it")
    masks = [4] if spec.kind == "instance_segmenter" else []
    fixed = None if tile is None else prepared(np.zeros((tile, tile, 3), np.uint8), architecture.image)[0].shape
    network = Network(folder, architecture.precision, [("f32", 4), ("i64", 1)], [2, 1, 1, *masks], fixed=fixed)
    return TwinDetector(network, architecture.image, len(spec.classes))


class TwinDetector:
    """Predictor over a converted detector, each image by itself: on a CPU a batch is no gain in itself."""

    def __init__(self, network: Network, settings: ImageInput, classes: int) -> None:
        self.network, self.settings, self.classes = network, settings, classes
        self.concurrent = network.streams

    @timed("forward")
    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Detect planes in RGB uint8 images of any sizes, `concurrent` of them at a time; see `Predictor`."""
        if self.concurrent == 1 or len(images) < self.concurrent:
            return [self._one(str(i), image) for i, image in enumerate(images)]
        with ThreadPoolExecutor(max_workers=self.concurrent) as pool:
            return list(pool.map(partial(self._one, at_a_time=True), map(str, range(len(images))), images))

    def _one(self, image_id: str, image: np.ndarray, at_a_time: bool = False) -> Instances:
        height, width = image.shape[:2]
        pixels, size = prepared(image, self.settings)
        boxes, scores, labels, *masks = self.network(pixels, np.array(size, np.int64), at_a_time=at_a_time)
        scale = np.array([width, height], np.float32) / np.array(size[::-1], np.float32)
        boxes = clip_boxes(boxes * np.tile(scale, 2), height, width)
        keep = pixel_sized(boxes)
        kept = labels[keep].astype(np.int64)
        if len(kept) and not (kept.min() >= 0 and kept.max() < self.classes):
            raise ModelError(f"the twin finds class {int(kept.max())}, and has {self.classes}; use --runtime torch")
        paste = paste_masks if self.settings.masks == "torchvision" else sample_masks
        pasted = paste(masks[0][keep, 0], boxes[keep], height, width) if masks else None
        return Instances.make(image_id, height, width, boxes[keep], scores[keep], labels=kept, masks=pasted)


class TwinSegmenter(CropSegmenter):
    """Segments the plane in a crop, with a converted network."""

    concurrent = 1

    def __init__(self, network: Network, settings: CropSettings) -> None:
        super().__init__(settings, CPU_BATCH)
        self.network = network

    def forward(self, batch: np.ndarray) -> np.ndarray:
        """See `CropSegmenter`."""
        (total,) = self.network(batch)
        if self.settings.flips:
            # Rows and columns are the last two axes, of the batch and of the probabilities alike.
            for axes in ((-2,), (-1,), (-2, -1)):
                mirrored = np.ascontiguousarray(np.flip(batch, axes))
                total = total + np.flip(self.network(mirrored)[0], axes)
            total = total / 4
        return total
