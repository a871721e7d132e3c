"""An image as a converted detector takes it: what torchvision and Detectron2 do before their networks, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

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
        image = np.asarray(whole.resize((width, height), Image.Resampling.BILINEAR))
    if image.shape[:2] == (height, width):
        pixels = cv2.LUT(np.ascontiguousarray(image), _values(settings.scale, tuple(settings.mean), tuple(settings.std)))
    else:
        resized = _resized(image.astype(np.float32), height, width, settings.resampling == "antialias")
        pixels = _normalised(resized, settings.scale, settings.mean, settings.std)
    divisor = max(1, settings.divisor)
    padded = np.zeros((1, 3, -(-height // divisor) * divisor, -(-width // divisor) * divisor), np.float32)
    for channel in range(3):
        padded[0, channel, :height, :width] = pixels[:, :, channel]
    return padded, (height, width)


def _normalised(pixels: np.ndarray, scale: float, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Float32 (..., 3), changed in place."""
    pixels /= np.float32(scale)
    pixels -= np.array(mean, np.float32)
    pixels /= np.array(std, np.float32)
    return pixels


@lru_cache(maxsize=16)
def _values(scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each value of a byte becomes, float32 (1, 256, 3): looking it up takes a quarter of computing it."""
    values = np.repeat(np.arange(256, dtype=np.float32)[None, :, None], 3, axis=2)
    return _normalised(values, scale, mean, std)


def _resized(pixels: np.ndarray, height: int, width: int, antialias: bool) -> np.ndarray:
    """Bilinear, float32 (H, W, 3) to (height, width, 3)."""
    if not antialias:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    # Pillow widens the filter when it shrinks, as torch's antialias does after its example.
    channels = [
        Image.fromarray(np.ascontiguousarray(pixels[:, :, c])).resize((width, height), Image.Resampling.BILINEAR)
        for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], axis=2)
