"""An image as a converted detector takes it: what torchvision and Detectron2 do before their networks, without torch."""

from __future__ import annotations

import math

import cv2
import numpy as np
from PIL import Image

from models.engines.openvino.settings import ImageInput


def scaled_size(height: int, width: int, settings: ImageInput) -> tuple[int, int]:
    """Height and width that an image is resized to.

    By torchvision's rule (`GeneralizedRCNNTransform`), or Detectron2's (`ResizeShortestEdge`)
    for ``pillow``.
    """
    if settings.zoom is not None:
        return max(1, round(height * settings.zoom)), max(1, round(width * settings.zoom))
    if settings.resampling == "pillow":
        if settings.min_size == 0:
            return height, width
        scale = settings.min_size / min(height, width)
        new = [settings.min_size, scale * width] if height < width else [scale * height, settings.min_size]
        if max(new) > settings.max_size:
            new = [side * (settings.max_size / max(new)) for side in new]
        return int(new[0] + 0.5), int(new[1] + 0.5)
    scale = min(settings.min_size / min(height, width), settings.max_size / max(height, width))
    return math.floor(height * scale), math.floor(width * scale)


def prepared(image: np.ndarray, settings: ImageInput) -> tuple[np.ndarray, tuple[int, int]]:
    """A detector's input of an RGB uint8 image (H, W, 3).

    Returns:
        float32 (1, 3, h, w), padded with zeros; and height and width of the image in it.
    """
    height, width = scaled_size(image.shape[0], image.shape[1], settings)
    if settings.bgr:
        image = image[:, :, ::-1]
    if settings.resampling == "pillow":
        whole = Image.fromarray(np.ascontiguousarray(image))
        pixels = np.asarray(whole.resize((width, height), Image.Resampling.BILINEAR)).astype(np.float32)
    else:
        pixels = _resized(image.astype(np.float32), height, width, settings.resampling == "antialias")
    pixels /= np.float32(settings.scale)
    pixels -= np.array(settings.mean, np.float32)
    pixels /= np.array(settings.std, np.float32)
    divisor = max(1, settings.divisor)
    padded = np.zeros((1, 3, -(-height // divisor) * divisor, -(-width // divisor) * divisor), np.float32)
    padded[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return padded, (height, width)


def _resized(pixels: np.ndarray, height: int, width: int, antialias: bool) -> np.ndarray:
    """Bilinear, float32 (H, W, 3) to (height, width, 3)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if not antialias:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    # Pillow widens the filter when it shrinks, as torch's antialias does after its example.
    channels = [
        Image.fromarray(np.ascontiguousarray(pixels[:, :, c])).resize((width, height), Image.Resampling.BILINEAR)
        for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], axis=2)
