"""From boxes to crops to masks, whatever runs the network; no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np

from models.engines.unet.settings import CropSettings
from models.geometry.boxes import crop_window
from models.geometry.rle import CropMask, rle_boxes, rle_encode, rle_paste
from models.instances import RLE, Instances
from models.runtime.timing import timed

# ImageNet statistics, which the encoders' pretrained weights expect.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

# Crops per forward pass. Measured on 2 CPU cores, 100 crops of 128 pixels, alternating, one by one against
# batches: of 4 1.40 times as long, of 8 1.61, of 12 1.71, of 16 1.57, of 32 1.45 (the caches). A GPU wants more.
CPU_BATCH, GPU_BATCH = 12, 128


def normalise(crops: np.ndarray, by: Literal["imagenet", "crop"] = "imagenet") -> np.ndarray:
    """RGB uint8 crops (B, S, S, 3) to the network's input, float32 (B, 3, S, S) in channels-last memory."""
    scaled = crops.astype(np.float32) / 255
    if by == "imagenet":
        scaled = (scaled - MEAN) / STD
    else:
        mean = scaled.mean(axis=(1, 2, 3), keepdims=True)
        scaled = (scaled - mean) / (scaled.std(axis=(1, 2, 3), keepdims=True) + np.float32(0.02))
    return scaled.transpose(0, 3, 1, 2)


class CropSegmenter(ABC):
    """Segments the plane in a crop; as a Predictor it takes each image as one crop."""

    def __init__(self, settings: CropSettings, batch: int) -> None:
        self.settings, self.batch = settings, batch

    @abstractmethod
    def forward(self, batch: np.ndarray) -> np.ndarray:
        """Plane probabilities, float32 (B, S, S), of normalised crops, float32 (B, 3, S, S)."""

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Each RGB uint8 image is one plane's crop: at most one instance, score its mean mask probability."""
        results = []
        for i, probability in enumerate(self.segment(images)):
            height, width = probability.shape
            mask = probability >= self.settings.threshold
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
        size = self.settings.crop_size
        results: list[np.ndarray] = []
        for start in range(0, len(crops), self.batch):
            batch = crops[start : start + self.batch]
            resized = np.stack([_resize(c, size, size) for c in batch])
            probabilities = self.forward(normalise(resized, self.settings.normalisation))
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
            [crop_window(box, image.shape[0], image.shape[1], self.settings.margin) for box in of_image]
            for image, of_image in zip(images, boxes, strict=True)
        ]
        crops = [image[y1:y2, x1:x2] for image, ws in zip(images, windows, strict=True) for x1, y1, x2, y2 in ws]
        probabilities = iter(self.segment(crops))
        threshold = self.settings.threshold
        return [[CropMask(next(probabilities) >= threshold, x1, y1) for x1, y1, _, _ in ws] for ws in windows]


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = image.shape[0] > height and image.shape[1] > width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
