"""Augmentation for aerial images: random windows, mirrors, quarter turns, free rotation, scale, light."""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.geometry.boxes import box_area, clip_boxes
from models.geometry.rle import CropMask


class Augmentation(BaseModel):
    """Augmentation of training examples; every number is a strength, 0 switches it off."""

    model_config = ConfigDict(extra="forbid")

    mirror: bool = Field(default=True, description="Flip left-right and up-down at random.")
    quarter_turns: bool = Field(default=True, description="Turn by multiples of 90 degrees at random.")
    rotation: float = Field(default=0.0, ge=0, le=180, description="Free rotation in degrees, either way.")
    scale: float = Field(default=0.0, ge=0, le=1, description="Relative change of size; 0.25: from 1/1.25 to 1.25.")
    brightness: float = Field(default=0.0, ge=0, lt=1, description="Relative change of brightness, either way.")
    contrast: float = Field(default=0.0, ge=0, lt=1, description="Relative change of contrast, either way.")
    saturation: float = Field(default=0.0, ge=0, lt=1, description="Relative change of saturation, either way.")
    hue: float = Field(
        default=0.0, ge=0, le=0.5, description="Turn of the colours either way, as a share of the colour circle."
    )
    grayscale: float = Field(default=0.0, ge=0, le=1, description="Share of the examples turned gray.")


def random_linear(rng: np.random.Generator, settings: Augmentation) -> np.ndarray:
    """A random (2, 2) matrix of the mirrors, turns and scale that ``settings`` allow."""
    angle = np.deg2rad(rng.uniform(-settings.rotation, settings.rotation))
    if settings.quarter_turns:
        angle += rng.integers(4) * np.pi / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # A quarter turn must not blur: exact zeros and ones stay exact.
    turn = np.where(np.abs(turn) < 1e-9, 0.0, turn)
    if settings.mirror and rng.random() < 0.5:
        turn = turn @ np.diag([-1.0, 1.0])
    return turn * (1 + settings.scale) ** rng.uniform(-1, 1)


def jitter_light(rng: np.random.Generator, image: np.ndarray, settings: Augmentation) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of an RGB uint8 image; returns uint8."""
    values = image.astype(np.float32)
    gray = values @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = 0.0 if rng.random() < settings.grayscale else 1 + rng.uniform(-1, 1) * settings.saturation
    values = (values - gray[:, :, None]) * np.float32(colour)
    if settings.hue and colour:
        values = values @ turned_hue(rng.uniform(-1, 1) * settings.hue)
    values += gray[:, :, None]
    mean = np.float32(gray.mean())
    values = mean + (values - mean) * np.float32(1 + rng.uniform(-1, 1) * settings.contrast)
    values *= np.float32(1 + rng.uniform(-1, 1) * settings.brightness)
    return values.round().clip(0, 255).astype(np.uint8)


def turned_hue(share: float) -> np.ndarray:
    """The (3, 3) float32 matrix that turns the colours of RGB rows, gray taken off, by a share of the circle.

    A turn about the axis of gray (Rodrigues' formula); brightness changes little.
    """
    angle, third = 2 * np.pi * share, 1 / 3
    cosine, sine = np.cos(angle), np.sin(angle)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * np.sqrt(third)
    return (cosine * np.eye(3) + (1 - cosine) * third + sine * across).T.astype(np.float32)


def random_window(
    rng: np.random.Generator,
    image: np.ndarray,
    boxes: np.ndarray,
    *,
    settings: Augmentation,
    size: int,
    focus: float,
    zoom: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a turned, scaled window of ``size`` pixels out of an image.

    With probability ``focus`` it is placed so that a random plane lies inside it,
    else anywhere. Outside the image it is black. ``zoom`` scales all windows alike.

    Returns:
        RGB uint8 (size, size, 3) and (2, 3) float64, the affine map from image pixels
        (edges at whole numbers) to window pixels.
    """
    height, width = image.shape[:2]
    linear = random_linear(rng, settings) * zoom
    reach = size / 2 / np.sqrt(abs(np.linalg.det(linear)))
    if len(boxes) and rng.random() < focus:
        x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
        centre = np.array([x1 + x2, y1 + y2]) / 2 + rng.uniform(-0.7, 0.7, 2) * reach
    else:
        centre = rng.uniform(0, 1, 2) * [width, height]
    # Keep the window inside where the image is large enough.
    for axis, extent in enumerate((width, height)):
        centre[axis] = extent / 2 if extent <= 2 * reach else np.clip(centre[axis], reach, extent - reach)
    affine = np.concatenate([linear, (size / 2 - linear @ centre)[:, None]], axis=1)
    return warp(image, affine, size), affine


def turned_whole(image: np.ndarray, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Carry a whole image through a (2, 2) map; corners of the canvas that it leaves empty are black.

    Mirrors and quarter turns change no pixel value.

    Returns:
        RGB uint8 image and (2, 3) float64, the affine map from image pixels to its pixels.
    """
    height, width = image.shape[:2]
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]]) @ linear.T
    shift = -corners.min(0)
    affine = np.concatenate([linear, shift[:, None]], axis=1)
    if np.abs(linear).round(9).tolist() in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        if abs(linear[0, 1]) > 0.5:
            image = image.transpose(1, 0, 2)
        flips = linear.sum(axis=1) < 0
        return np.ascontiguousarray(image[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]), affine
    size = np.maximum(np.ceil(np.ptp(corners, axis=0) - 1e-6), 1).astype(int)
    return warp(image, affine, (int(size[1]), int(size[0]))), affine


def shortest_edge(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """Height and width with the shorter side at ``size``, the longer at most ``max_size``; size 0 keeps both.

    Detectron2's ResizeShortestEdge.
    """
    if size == 0:
        return height, width
    scale = size / min(height, width)
    new = [size, scale * width] if height < width else [scale * height, size]
    if max(new) > max_size:
        shrink = max_size / max(new)
        new = [side * shrink for side in new]
    return int(new[0] + 0.5), int(new[1] + 0.5)


def warp(image: np.ndarray, affine: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resample an image into a square or (height, width) window; ``affine`` maps pixel edges, not pixel centres."""
    height, width = (size, size) if isinstance(size, int) else size
    shrink = np.sqrt(abs(np.linalg.det(affine[:, :2])))
    linear, shift = affine[:, :2], affine[:, 2]
    if shrink < 0.5:
        # Linear interpolation skips pixels when it shrinks: average them first, and
        # only those that the window shows.
        inverse = np.linalg.inv(linear).T
        corners = (np.array([[0, 0], [width, 0], [0, height], [width, height]]) - shift) @ inverse
        reach = round(1 / shrink)
        x1, y1 = np.maximum(np.floor(corners.min(0)).astype(int) - 2 * reach, 0)
        x2, y2 = np.ceil(corners.max(0)).astype(int) + 2 * reach
        if x2 > x1 and y2 > y1 and x1 < image.shape[1] and y1 < image.shape[0]:
            image = cv2.blur(image[y1:y2, x1:x2], (reach, reach))
            shift = shift + linear @ [x1, y1]
    centred = np.concatenate([linear, (shift + linear @ [0.5, 0.5] - 0.5)[:, None]], axis=1)
    return cv2.warpAffine(image, centred, (width, height), flags=cv2.INTER_LINEAR)


def move_mask(crop: CropMask, affine: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Carry a mask into a window.

    Args:
        crop: the mask in its own part of the image.
        affine: (2, 3) map from image pixels to window pixels.
        size: (height, width) of the window.

    Returns:
        uint8 (height, width), 1 where at least half of a pixel is covered.
    """
    mask, left, top = crop
    rows, columns = mask.shape
    corners = np.array([[left, top], [left + columns, top], [left, top + rows], [left + columns, top + rows]])
    moved = corners @ affine[:, :2].T + affine[:, 2]
    window = np.zeros(size, np.uint8)
    x1, y1 = np.maximum(np.floor(moved.min(0)).astype(int), 0)
    x2, y2 = np.minimum(np.ceil(moved.max(0)).astype(int), [size[1], size[0]])
    if x2 > x1 and y2 > y1:
        shift = affine[:, 2] + affine[:, :2] @ [left, top] - [x1, y1]
        inner = np.concatenate([affine[:, :2], shift[:, None]], axis=1)
        window[y1:y2, x1:x2] = warp(mask.astype(np.uint8) * 255, inner, (int(y2 - y1), int(x2 - x1))) >= 128
    return window


def move_boxes(
    boxes: np.ndarray, affine: np.ndarray, size: int | tuple[int, int], min_visible: float
) -> tuple[np.ndarray, np.ndarray]:
    """Carry xyxy boxes (N, 4) into a square or (height, width) window.

    A turned box becomes the box around its turned ellipse, which encloses a plane
    less loosely than that around its corners.

    Returns:
        Boxes (K, 4) float32 clipped to the window, and the indices (K,) of those with
        at least ``min_visible`` of their area inside.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 @ affine[:, :2].T + affine[:, 2]
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    # Half extents of the turned inscribed ellipse; equal to the turned box for quarter turns.
    reach = np.sqrt((half**2) @ (affine[:, :2] ** 2).T)
    moved = np.concatenate([centre - reach, centre + reach], axis=1)
    height, width = (size, size) if isinstance(size, int) else size
    clipped = clip_boxes(moved, height, width)
    visible = box_area(clipped) / np.maximum(box_area(moved), 1e-9)
    keep = np.flatnonzero((visible >= min_visible) & (box_area(clipped) >= 4))
    return clipped[keep], keep
