"""Training batches as pure functions of (seed, step): a resumed run sees what an undisturbed one would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import cv2
import numpy as np
from PIL import Image

from models.engines.unet.settings import SegmenterArchitecture
from models.errors import DataError
from models.geometry.boxes import crop_window
from models.geometry.rle import CropMask, rle_boxes, rle_decode
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.loading.augment import (
    Augmentation,
    jitter_light,
    move_boxes,
    move_mask,
    random_linear,
    random_window,
    scale_to,
    shortest_edge,
    turned_whole,
    warp,
)
from pipelines.data.loading.cache import ImageCache
from pipelines.data.loading.paste import cut_out, paste
from pipelines.data.loading.unreadable import Unreadable


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


@dataclass(frozen=True)
class Example:
    """A training image with its planes.

    Attributes:
        image: RGB uint8 (H, W, 3).
        boxes: xyxy float32 (K, 4).
        masks: uint8 (K, H, W); None where only boxes are wanted.
    """

    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class OtherWindows:
    """Another data set from which a share of the windows comes, cut at a scale of its own."""

    dataset: Dataset
    share: float
    zoom: float


@dataclass
class DetectorBatches:
    """Batch ``step`` -> list of Example; the same for every engine.

    With ``window`` pixels set, random windows are cut; else whole images are used, both
    scaled by ``zoom``, and where ``edges`` is given brought to one of those shorter sides,
    at most ``max_edge`` long. ``masks``: make masks too. ``other``: a share of the examples, drawn by
    chance, is of that data set instead, whose images are no part of an epoch. ``unreadable``: images that cannot be
    read are noted there, and others take their place.
    """

    dataset: Dataset
    augmentation: Augmentation
    _: KW_ONLY
    batch_size: int
    window: int | None
    focus: float
    min_visible: float
    seed: int
    zoom: float = 1.0
    plane_sizes: tuple[float, float] | None = None
    masks: bool = False
    edges: tuple[int, ...] = (0,)
    max_edge: int = 0
    other: OtherWindows | None = None
    unreadable: Unreadable = field(default_factory=Unreadable)

    def __post_init__(self) -> None:
        if not self.dataset.planes:
            raise DataError(f"{self.dataset.name}: no annotated planes to train on")
        if self.masks and not self.dataset.has_masks:
            raise DataError(f"{self.dataset.name}: planes have no outlines (segmentation) to train on")
        self._whole = _whole_planes(self.dataset.samples) if self.augmentation.paste else {}
        if self.augmentation.paste and not self._whole:
            raise DataError(
                f"{self.dataset.name}: no whole plane has an outline (segmentation) to paste by; set augmentation.paste=0"
            )
        self._donors = list(self._whole)
        self._cache = ImageCache()
        self._masks: dict[tuple[int, int], CropMask] = {}
        self._others = None
        if self.other is not None:
            self._others = replace(self, dataset=self.other.dataset, zoom=self.other.zoom, other=None)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, -(-len(self.dataset) // self.batch_size))

    def __getitem__(self, step: int) -> list[Example]:
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world: int) -> list[Example]:
        """The examples of batch ``step`` that fall to process ``rank`` of ``world``."""
        items = epoch_items(self.seed, step, self.batch_size, len(self.dataset))
        mine = list(enumerate(items))[rank::world]
        return [self._example(item, np.random.default_rng([self.seed, 2, step, i])) for i, item in mine]

    def _example(self, item: int, rng: np.random.Generator) -> Example:
        if self.other is not None and self._others is not None and rng.random() < self.other.share:
            return self._others._example(int(rng.integers(len(self.other.dataset))), rng)
        samples = self.dataset.samples
        item, image = self.unreadable.first_readable(item, len(samples), samples.__getitem__, self._cache.read)
        sample = samples[item]
        # A plane without an outline is no target of a mask head, so it is none of the box head either.
        real = sample.outlined if self.masks else np.flatnonzero(~sample.crowd)
        boxes = sample.boxes[real]
        if self.window:
            image, affine = random_window(
                rng,
                image,
                boxes,
                settings=self.augmentation,
                size=self.window,
                focus=self.focus,
                zoom=self.zoom,
                plane_sizes=self.plane_sizes,
            )
        else:
            image, affine = turned_whole(image, random_linear(rng, self.augmentation) * self.zoom)
            image, affine = self._fit(image, affine, self.edges[rng.integers(len(self.edges))])
        size = image.shape[:2]
        boxes, kept = move_boxes(boxes, affine, size, self.min_visible)
        image, pasted, tight = self._paste(rng, image, move_boxes(sample.boxes, affine, size, 0)[0], affine)
        image = jitter_light(rng, image, self.augmentation)
        if not self.masks:
            return Example(image, np.concatenate([boxes, tight]))
        masks = [move_mask(self._mask(item, int(real[k])), affine, size) for k in kept] + pasted
        without = ~sample.crowd
        without[sample.outlined] = False
        hidden, _ = move_boxes(sample.boxes[without], affine, size, 0)
        return _with_masks(_painted_over(image, hidden, masks), masks)

    def _paste(
        self, rng: np.random.Generator, image: np.ndarray, taken: np.ndarray, affine: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """The image with planes of another pasted where no box of ``taken`` is, their masks and boxes; see `paste`."""
        if not self.augmentation.paste:
            return image, [], np.zeros((0, 4), np.float32)
        image, masks, known = image.copy(), [], len(taken)
        zoom = self.zoom if self.window else np.sqrt(abs(np.linalg.det(affine[:, :2])))
        # Of one image, as in the paper: each further one would have to be decoded.
        place, whole = self.unreadable.first_readable(
            int(rng.integers(len(self._donors))), len(self._donors), self._donor, self._cache.read
        )
        item = self._donors[place]
        for _ in range(rng.integers(self.augmentation.paste + 1)):
            plane = int(rng.choice(self._whole[item]))
            linear = random_linear(rng, self.augmentation) * zoom
            if self.plane_sizes:
                linear = linear * scale_to(rng, self.dataset.samples[item].boxes[plane] * zoom, self.plane_sizes)
            mask = paste(rng, image, cut_out(whole, self._mask(item, plane)), linear, taken)
            if mask is not None:
                masks.append(mask)
                taken = np.concatenate([taken, _tight_boxes([mask])])
        return image, masks, taken[known:]

    def _donor(self, place: int) -> Sample:
        return self.dataset.samples[self._donors[place]]

    def _fit(self, image: np.ndarray, affine: np.ndarray, edge: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        new = shortest_edge(height, width, edge, self.max_edge)
        if new == (height, width):
            return image, affine
        # Pillow's filter averages when it shrinks; Detectron2 resizes test images with it too.
        resized = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR))
        return resized, np.diag([new[1] / width, new[0] / height]) @ affine

    def _mask(self, item: int, plane: int) -> CropMask:
        if (item, plane) not in self._masks:
            sample = self.dataset.samples[item]
            rle = sample.masks[plane]
            assert rle is not None, "planes without an outline are left out where masks are learnt"
            x1, y1, x2, y2 = crop_window(rle_boxes([rle])[0], sample.height, sample.width)
            self._masks[item, plane] = CropMask(rle_decode(rle)[y1:y2, x1:x2], x1, y1)
        return self._masks[item, plane]


def _whole_planes(samples: Sequence[Sample]) -> dict[int, np.ndarray]:
    """The planes with an outline that no border of their image cuts, int64 (K,), by the place of the image; K > 0."""
    whole = {}
    for place, sample in enumerate(samples):
        x1, y1, x2, y2 = sample.boxes[sample.outlined].T
        inside = (x1 >= 1) & (y1 >= 1) & (x2 <= sample.width - 1) & (y2 <= sample.height - 1)
        if inside.any():
            whole[place] = sample.outlined[inside]
    return whole


def _painted_over(image: np.ndarray, boxes: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Paint the boxes, xyxy (K, 4), of an image in its mean colour, but for pixels of the masks.

    Planes that are shown but are no targets would be taught as background.
    """
    if not len(boxes):
        return image
    painted, shown = image.copy(), np.any(masks, axis=0) if masks else np.zeros(image.shape[:2], bool)
    mean = image.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    for box in boxes:
        x1, y1, x2, y2 = crop_window(box, *image.shape[:2])
        painted[y1:y2, x1:x2][~shown[y1:y2, x1:x2]] = mean
    return painted


def _with_masks(image: np.ndarray, masks: list[np.ndarray]) -> Example:
    """The example with boxes drawn tight around the visible pixels of each mask; planes without a pixel are dropped."""
    seen = [m for m in masks if m.any()]
    if not seen:
        return Example(image, np.zeros((0, 4), np.float32), np.zeros((0, *image.shape[:2]), np.uint8))
    return Example(image, _tight_boxes(seen), np.stack(seen))


def _tight_boxes(masks: Sequence[np.ndarray]) -> np.ndarray:
    """The boxes xyxy float32 (K, 4) of masks (H, W), each of which has a pixel."""
    rows = [np.flatnonzero(m.any(axis=1))[[0, -1]] for m in masks]
    columns = [np.flatnonzero(m.any(axis=0))[[0, -1]] for m in masks]
    return np.array([[c[0], r[0], c[1] + 1, r[1] + 1] for r, c in zip(rows, columns, strict=True)], np.float32)


@dataclass
class SegmenterBatches:
    """Batch ``step`` -> (RGB uint8 crops (B, S, S, 3), coverage masks float32 (B, S, S)).

    ``unreadable``: images that cannot be read are noted there, and other planes take the place of theirs.
    """

    dataset: Dataset
    augmentation: Augmentation
    architecture: SegmenterArchitecture
    _: KW_ONLY
    batch_size: int
    box_jitter: float
    seed: int
    unreadable: Unreadable = field(default_factory=Unreadable)

    def __post_init__(self) -> None:
        if not self.dataset.has_masks:
            raise DataError(f"{self.dataset.name}: planes have no outlines (segmentation) to train on")
        self._cache = ImageCache()
        self._planes = [(i, j) for i, s in enumerate(self.dataset.samples) for j in s.outlined.tolist()]
        self._masks: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, -(-len(self._planes) // self.batch_size))

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of batch ``step`` that fall to process ``rank`` of ``world``."""
        items = epoch_items(self.seed, step, self.batch_size, len(self._planes))
        mine = list(enumerate(items))[rank::world]
        pairs = [self._example(item, np.random.default_rng([self.seed, 3, step, i])) for i, item in mine]
        return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])

    def _sample_of(self, item: int) -> Sample:
        return self.dataset.samples[self._planes[item][0]]

    def _example(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        item, whole = self.unreadable.first_readable(item, len(self._planes), self._sample_of, self._cache.read)
        i, j = self._planes[item]
        sample, size = self.dataset.samples[i], self.architecture.crop_size
        # The surroundings are enough for any turn of the crop.
        x1, y1, x2, y2 = crop_window(sample.boxes[j], sample.height, sample.width, 0.8)
        if item not in self._masks:
            self._masks[item] = rle_decode(sample.masks[j])[y1:y2, x1:x2].astype(np.uint8)
        image, mask = whole[y1:y2, x1:x2], self._masks[item]
        affine = self._crop_affine(rng, sample.boxes[j] - np.array([x1, y1, x1, y1]), mask, size)
        crop = jitter_light(rng, warp(image, affine, size), self.augmentation)
        return crop, warp(mask * 255, affine, size).astype(np.float32) / 255

    def _crop_affine(self, rng: np.random.Generator, box: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """Map the (turned, jittered, widened) tight box of the plane onto the crop."""
        linear = random_linear(rng, self.augmentation)
        if self.augmentation.rotation:
            rows, columns = np.nonzero(mask)
            if not len(rows):
                rows, columns = (np.array([v, v + 1]) for v in (int(box[1]), int(box[0])))
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
