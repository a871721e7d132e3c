"""Predictions and masks of an image carried to another size of it."""

from __future__ import annotations

import cv2
import numpy as np

from models.geometry.boxes import clip_boxes
from models.geometry.rle import rle_crop, rle_paste
from models.instances import RLE, Instances


def rescaled(found: Instances, height: int, width: int) -> Instances:
    """What was found in an image, in pixels of the same image at another size, masks too."""
    if (height, width) == (found.height, found.width):
        return found
    scale = np.array([width / found.width, height / found.height] * 2)
    masks = None
    if found.masks is not None:
        masks = [rescaled_mask(rle, scale, height, width) for rle in found.masks]
    return Instances.make(
        found.image_id, height, width, clip_boxes(found.boxes * scale, height, width), found.scores, found.labels, masks
    )


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
