"""Augmentation for aerial images: random windows, mirrors, quarter turns, free rotation, scale, light."""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.geometry import box_area, clip_boxes


class Augmentation(BaseModel):
    """Recipe entries; every number is a strength, 0 switches it off.

    ``mirror`` flips left-right and up-down; ``quarter_turns`` turns by 90 degrees;
    ``rotation`` is a free angle in degrees either way; ``scale`` a relative change of
    size (0.25: from 1/1.25 to 1.25); ``brightness``, ``contrast``, ``saturation``
    relative changes of light; ``grayscale`` the share of images turned gray.
    """

    model_config = ConfigDict(extra="forbid")

    mirror: bool = True
    quarter_turns: bool = True
    rotation: float = Field(default=0.0, ge=0, le=180)
    scale: float = Field(default=0.0, ge=0, le=1)
    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)
    saturation: float = Field(default=0.0, ge=0, lt=1)
    grayscale: float = Field(default=0.0, ge=0, le=1)


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
    """Change brightness, contrast and saturation of an RGB uint8 image; returns uint8."""
    values = image.astype(np.float32)
    gray = values @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = 0.0 if rng.random() < settings.grayscale else 1 + rng.uniform(-1, 1) * settings.saturation
    values = gray[:, :, None] + (values - gray[:, :, None]) * np.float32(colour)
    mean = np.float32(gray.mean())
    values = mean + (values - mean) * np.float32(1 + rng.uniform(-1, 1) * settings.contrast)
    values *= np.float32(1 + rng.uniform(-1, 1) * settings.brightness)
    return values.round().clip(0, 255).astype(np.uint8)


def random_window(
    rng: np.random.Generator,
    image: np.ndarray,
    boxes: np.ndarray,
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


def warp(image: np.ndarray, affine: np.ndarray, size: int) -> np.ndarray:
    """Resample an image into a square window; ``affine`` maps pixel edges, not pixel centres."""
    shrink = np.sqrt(abs(np.linalg.det(affine[:, :2])))
    linear, shift = affine[:, :2], affine[:, 2]
    if shrink < 0.5:
        # Linear interpolation skips pixels when it shrinks: average them first, and
        # only those that the window shows.
        corners = (np.array([[0, 0], [size, 0], [0, size], [size, size]]) - shift) @ np.linalg.inv(linear).T
        reach = round(1 / shrink)
        x1, y1 = np.maximum(np.floor(corners.min(0)).astype(int) - 2 * reach, 0)
        x2, y2 = np.ceil(corners.max(0)).astype(int) + 2 * reach
        if x2 > x1 and y2 > y1 and x1 < image.shape[1] and y1 < image.shape[0]:
            image = cv2.blur(image[y1:y2, x1:x2], (reach, reach))
            shift = shift + linear @ [x1, y1]
    centred = np.concatenate([linear, (shift + linear @ [0.5, 0.5] - 0.5)[:, None]], axis=1)
    return cv2.warpAffine(image, centred, (size, size), flags=cv2.INTER_LINEAR)


def move_boxes(boxes: np.ndarray, affine: np.ndarray, size: int, min_visible: float) -> tuple[np.ndarray, np.ndarray]:
    """Carry xyxy boxes (N, 4) into a window of ``size`` pixels.

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
    clipped = clip_boxes(moved, size, size)
    visible = box_area(clipped) / np.maximum(box_area(moved), 1e-9)
    keep = np.flatnonzero((visible >= min_visible) & (box_area(clipped) >= 4))
    return clipped[keep], keep
