"""Predictions and masks of an image carried to another size of it."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from models.geometry.boxes import clip_boxes
from models.geometry.rle import rle_crop, rle_paste
from models.instances import RLE, Instances


def rescaled(instances: Instances, height: int, width: int) -> Instances:
    """Scale predictions, masks too, to another size of the same image (pixels)."""
    if (height, width) == (instances.height, instances.width):
        return instances
    scale = np.array([width / instances.width, height / instances.height] * 2)
    masks = None
    if instances.masks is not None:
        masks = tuple(rescaled_mask(rle, scale, height, width) for rle in instances.masks)
    boxes = clip_boxes(instances.boxes * scale, height, width)
    return replace(instances, height=height, width=width, boxes=boxes, masks=masks)


def weighted(instances: Instances, factor: float) -> Instances:
    """The same predictions, their scores multiplied."""
    return instances if factor == 1 else replace(instances, scores=instances.scores * np.float32(factor))


def rescaled_mask(rle: RLE, scale: np.ndarray, height: int, width: int) -> RLE:
    """A mask in an image of another size; ``scale`` is new by old, (4,): x, y, x, y."""
    mask, left, top = rle_crop(rle)
    if not mask.size:
        return rle_paste(mask, 0, 0, height, width)
    bounds = np.array([left, top, left + mask.shape[1], top + mask.shape[0]]) * scale
    x1, y1, x2, y2 = clip_boxes(bounds.round(), height, width)[0].astype(int).tolist()
    if x2 <= x1 or y2 <= y1:
        return rle_paste(mask[:0, :0], 0, 0, height, width)
    smooth = cv2.resize(mask.astype(np.float32), (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)
    return rle_paste(smooth >= 0.5, x1, y1, height, width)
