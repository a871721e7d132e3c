"""Training batches as pure functions of (seed, step): a resumed run sees what an undisturbed one would."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from models.errors import DataError
from models.geometry import crop_window, rle_decode
from models.unet import SegmenterArchitecture
from pipelines.data.augment import Augmentation, jitter_light, move_boxes, random_linear, random_window, warp
from pipelines.data.cache import ImageCache
from pipelines.data.dataset import Dataset


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of ``count`` items in an epoch."""
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def epoch_items(seed: int, step: int, batch_size: int, count: int) -> list[int]:
    """Items of batch ``step`` when ``count`` items are passed over again and again, each epoch in new order."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, np.ndarray] = {}
    items = []
    for position in positions:
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = epoch_order(seed, epoch, count)
        items.append(int(orders[epoch][place]))
    return items


@dataclass
class DetectorBatches:
    """Batch ``step`` -> list of (RGB uint8 image, xyxy float32 boxes (K, 4)).

    With ``window`` pixels set, random windows are cut; else whole images are used.
    """

    dataset: Dataset
    augmentation: Augmentation
    batch_size: int
    window: int | None
    focus: float
    min_visible: float
    seed: int
    zoom: float = 1.0

    def __post_init__(self) -> None:
        if not self.dataset.planes:
            raise DataError(f"{self.dataset.name}: no annotated planes to train on")
        self._cache = ImageCache()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, -(-len(self.dataset) // self.batch_size))

    def __getitem__(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        items = epoch_items(self.seed, step, self.batch_size, len(self.dataset))
        return [self._example(item, np.random.default_rng([self.seed, 2, step, i])) for i, item in enumerate(items)]

    def _example(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sample = self.dataset.samples[item]
        boxes = sample.boxes[~sample.crowd]
        image = self._cache.read(sample)
        if self.window:
            image, affine = random_window(rng, image, boxes, self.augmentation, self.window, self.focus, self.zoom)
            boxes, _ = move_boxes(boxes, affine, self.window, self.min_visible)
        else:
            image, boxes = mirror_whole(rng, image, boxes, self.augmentation)
        return jitter_light(rng, image, self.augmentation), boxes


def mirror_whole(
    rng: np.random.Generator, image: np.ndarray, boxes: np.ndarray, settings: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """Mirror and quarter-turn a whole image, which changes no pixel value."""
    boxes = boxes.astype(np.float32).copy()
    if settings.mirror and rng.random() < 0.5:
        image = image[:, ::-1]
        boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
    for _ in range(int(rng.integers(4)) if settings.quarter_turns else 0):
        # One turn to the left: x -> y, y -> width - x.
        width = image.shape[1]
        image = np.rot90(image)
        boxes = np.stack([boxes[:, 1], width - boxes[:, 2], boxes[:, 3], width - boxes[:, 0]], axis=1)
    return np.ascontiguousarray(image), boxes


@dataclass
class SegmenterBatches:
    """Batch ``step`` -> (RGB uint8 crops (B, S, S, 3), coverage masks float32 (B, S, S))."""

    dataset: Dataset
    augmentation: Augmentation
    architecture: SegmenterArchitecture
    batch_size: int
    box_jitter: float
    seed: int

    def __post_init__(self) -> None:
        if not self.dataset.has_masks:
            raise DataError(f"{self.dataset.name}: planes have no outlines (segmentation) to train on")
        self._cache = ImageCache()
        self._planes = [(i, j) for i, s in enumerate(self.dataset.samples) for j in range(len(s.boxes)) if not s.crowd[j]]
        self._masks: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, -(-len(self._planes) // self.batch_size))

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        items = epoch_items(self.seed, step, self.batch_size, len(self._planes))
        pairs = [self._example(item, np.random.default_rng([self.seed, 3, step, i])) for i, item in enumerate(items)]
        return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])

    def _example(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        i, j = self._planes[item]
        sample, size = self.dataset.samples[i], self.architecture.crop_size
        # The surroundings are enough for any turn of the crop.
        x1, y1, x2, y2 = crop_window(sample.boxes[j], sample.height, sample.width, 0.8)
        if item not in self._masks:
            self._masks[item] = rle_decode(sample.masks[j])[y1:y2, x1:x2].astype(np.uint8)
        image, mask = self._cache.read(sample)[y1:y2, x1:x2], self._masks[item]
        affine = self._crop_affine(rng, sample.boxes[j] - np.array([x1, y1, x1, y1]), mask, size)
        crop = jitter_light(rng, warp(image, affine, size), self.augmentation)
        return crop, warp(mask * 255, affine, size).astype(np.float32) / 255

    def _crop_affine(self, rng: np.random.Generator, box: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """Map the (turned, jittered, widened) tight box of the plane onto the crop."""
        linear = random_linear(rng, self.augmentation)
        if self.augmentation.rotation:
            rows, columns = np.nonzero(mask)
            points = cv2.convexHull(np.stack([columns, rows], axis=1).astype(np.float32))[:, 0] + 0.5
            pad = 0.5
        else:
            points, pad = np.array([[x, y] for x in box[[0, 2]] for y in box[[1, 3]]]), 0.0
        turned = points @ linear.T
        low, high = turned.min(0) - pad * np.abs(linear).sum(1), turned.max(0) + pad * np.abs(linear).sum(1)
        extent = high - low
        low = low - extent * (self.architecture.margin + rng.uniform(-1, 1, 2) * self.box_jitter)
        high = high + extent * (self.architecture.margin + rng.uniform(-1, 1, 2) * self.box_jitter)
        scale = np.diag(size / np.maximum(high - low, 1.0))
        return np.concatenate([scale @ linear, (-scale @ low)[:, None]], axis=1)
