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
    colour_cast: float = Field(
        default=0.0, ge=0, lt=1, description="Relative change of each colour channel by itself, either way."
    )
    gamma: float = Field(
        default=0.0, ge=0, le=2, description="Change of the exponent of brightness; 0.5: from 1/1.5 to 1.5."
    )
    haze: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Largest share of a pale veil laid over half of the examples, as haze and glare are.",
    )
    blur: float = Field(
        default=0.0, ge=0, le=10, description="Largest sigma in pixels of a Gaussian blur of half of the examples."
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Largest standard deviation, of 255, of sensor noise in half of the examples.",
    )
    paste: int = Field(
        default=0,
        ge=0,
        le=50,
        description=(
            "Most planes of one training image, cut out by their outlines, that are pasted into an example of a "
            "detector; none to that many, evenly."
        ),
    )


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
    """Change light and colour of an RGB uint8 image, then haze, blur and noise, as ``settings`` allow; returns uint8."""
    matrix = _colours(rng, settings)
    # Contrast is about the mean brightness.
    mean = float(np.dot(cv2.mean(image)[:3], GRAY))
    contrast = 1 + rng.uniform(-1, 1) * settings.contrast
    brightness = 1 + rng.uniform(-1, 1) * settings.brightness
    matrix = matrix * (contrast * brightness)
    shift = np.full(3, mean * (1 - contrast) * brightness)
    if settings.colour_cast:
        cast = 1 + rng.uniform(-1, 1, 3) * settings.colour_cast
        matrix, shift = matrix * cast[:, None], shift * cast
    image = cv2.transform(image, np.concatenate([matrix, shift[:, None]], axis=1))
    if settings.gamma:
        exponent = (1 + settings.gamma) ** rng.uniform(-1, 1)
        image = cv2.LUT(image, (255 * (np.arange(256) / 255) ** exponent).round().astype(np.uint8))
    return _weather(rng, image, settings)


# Weights of red, green and blue in brightness (ITU-R BT.601).
GRAY = np.array([0.299, 0.587, 0.114])


def _colours(rng: np.random.Generator, settings: Augmentation) -> np.ndarray:
    """The (3, 3) matrix of a random change of saturation and hue; brightness stays."""
    colour = 0.0 if rng.random() < settings.grayscale else 1 + rng.uniform(-1, 1) * settings.saturation
    gray = np.tile(GRAY, (3, 1))
    of_colour = (np.eye(3) - gray) * colour
    if settings.hue and colour:
        of_colour = turned_hue(rng.uniform(-1, 1) * settings.hue).T.astype(np.float64) @ of_colour
    return of_colour + gray


def _weather(rng: np.random.Generator, image: np.ndarray, settings: Augmentation) -> np.ndarray:
    """Haze (a veil of one pale colour, by Koschmieder's law at one depth), blur, and noise of the sensor."""
    if settings.haze and rng.random() < 0.5:
        veil = rng.uniform(0, settings.haze)
        light = rng.uniform(150, 255) + rng.uniform(-12, 12, 3)
        image = cv2.transform(image, np.concatenate([np.eye(3) * (1 - veil), (light * veil)[:, None]], axis=1))
    if settings.blur and rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), max(rng.uniform(0, settings.blur), 0.05))
    if settings.noise and rng.random() < 0.5:
        grain = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, settings.noise))
        image = (image + grain).round().clip(0, 255).astype(np.uint8)
    return image


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
    plane_sizes: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a turned, scaled window of ``size`` pixels out of an image; see `place_window`. Outside the image it is black.

    Returns:
        RGB uint8 (size, size, 3) and (2, 3) float64, the affine map from image pixels
        (edges at whole numbers) to window pixels.
    """
    affine = place_window(
        rng, image.shape[:2], boxes, settings=settings, size=size, focus=focus, zoom=zoom, plane_sizes=plane_sizes
    )
    return warp(image, affine, size), affine


def place_window(
    rng: np.random.Generator,
    extent: tuple[int, ...],
    boxes: np.ndarray,
    *,
    settings: Augmentation,
    size: int,
    focus: float,
    zoom: float = 1.0,
    plane_sizes: tuple[float, float] | None = None,
) -> np.ndarray:
    """Where a random window of an image is, as the affine map (2, 3) from image pixels to window pixels.

    With probability ``focus`` it is placed so that a random plane lies inside it,
    else anywhere. ``zoom`` scales all windows alike; ``plane_sizes`` is the range of
    longer sides, in window pixels, to one of which a random plane of the image is scaled.
    """
    height, width = extent
    linear = random_linear(rng, settings) * zoom
    chosen = int(rng.integers(len(boxes))) if len(boxes) else None
    if plane_sizes:
        linear = linear * scale_to(rng, None if chosen is None else boxes[chosen] * zoom, plane_sizes)
    reach = size / 2 / np.sqrt(abs(np.linalg.det(linear)))
    if chosen is not None and rng.random() < focus:
        x1, y1, x2, y2 = boxes[chosen]
        centre = np.array([x1 + x2, y1 + y2]) / 2 + rng.uniform(-0.7, 0.7, 2) * reach
    else:
        centre = rng.uniform(0, 1, 2) * [width, height]
    # Keep the window inside where the image is large enough.
    for axis, side in enumerate((width, height)):
        centre[axis] = side / 2 if side <= 2 * reach else np.clip(centre[axis], reach, side - reach)
    return np.concatenate([linear, (size / 2 - linear @ centre)[:, None]], axis=1)


# Planes are enlarged and shrunk by no more than that: an enlarged one has no more detail.
MOST_ENLARGED, MOST_SHRUNK = 2.0, 8.0


def scale_to(rng: np.random.Generator, box: np.ndarray | None, sizes: tuple[float, float]) -> float:
    """The factor that brings a box to a longer side drawn from a range, evenly on a logarithmic scale."""
    target = float(np.exp(rng.uniform(np.log(sizes[0]), np.log(sizes[1]))))
    # An image without planes: as if it had one of the middle of the range.
    side = float(np.sqrt(sizes[0] * sizes[1])) if box is None else float(max(box[2] - box[0], box[3] - box[1]))
    return float(np.clip(target / max(side, 1.0), 1 / MOST_SHRUNK, MOST_ENLARGED))


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
