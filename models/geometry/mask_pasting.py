"""Masks that a network gives for boxes, as masks of the image."""

from __future__ import annotations

import cv2
import numpy as np

from models.geometry.boxes import crop_window
from models.geometry.rle import rle_paste
from models.instances import RLE


def paste_masks(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> list[RLE]:
    """Masks of boxes to RLE of the image, at a threshold of 0.5.

    The same pixels as torchvision's ``paste_masks_in_image``, made window by window: no dense mask of the image
    is needed.

    Args:
        masks: float (N, M, M), probabilities over each box.
        boxes: xyxy float (N, 4), in pixels of the image.
    """
    if not len(masks):
        return []
    # A border of zeros, and the boxes grown as much: the mask falls off to its box's edge.
    padded = np.pad(masks.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    corners = _grown(boxes.astype(np.float32), np.float32(padded.shape[1] / masks.shape[1])).astype(np.int64)
    pasted = []
    for mask, (x1, y1, x2, y2) in zip(padded, corners.tolist(), strict=True):
        resized = cv2.resize(mask, (max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)), interpolation=cv2.INTER_LINEAR)
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, width), min(y2 + 1, height)
        pixels = resized[top - y1 : bottom - y1, left - x1 : right - x1]
        pasted.append(rle_paste(pixels >= 0.5, left, top, height, width))
    return pasted


def sample_masks(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> list[RLE]:
    """As `paste_masks`, but the same pixels as Detectron2's ``paste_masks_in_image``: masks sampled at pixels' centres."""
    pasted = []
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(np.float64).tolist(), strict=True):
        left, top, right, bottom = crop_window([x1 - 1, y1 - 1, x2 + 1, y2 + 1], height, width)
        rows = _weights(np.arange(top, bottom), y1, y2, mask.shape[0])
        columns = _weights(np.arange(left, right), x1, x2, mask.shape[1])
        pasted.append(rle_paste(rows @ mask @ columns.T >= 0.5, left, top, height, width))
    return pasted


def _weights(pixels: np.ndarray, first: float, last: float, cells: int) -> np.ndarray:
    """How much each cell of a mask over ``first`` to ``last`` counts at each pixel's centre, (pixels, cells); bilinear."""
    places = (pixels + 0.5 - first) / (last - first) * cells - 0.5
    return (1 - np.abs(places[:, None] - np.arange(cells))).clip(0)


def _grown(boxes: np.ndarray, scale: np.float32) -> np.ndarray:
    """Boxes of the same centres, ``scale`` times as wide and high."""
    centre = (boxes[:, :2] + boxes[:, 2:]) * np.float32(0.5)
    half = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5) * scale
    return np.concatenate([centre - half, centre + half], axis=1)
