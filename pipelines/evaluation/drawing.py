"""Overlays and sample sheets as RGB arrays, drawn by OpenCV."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from models.geometry.boxes import crop_window
from models.geometry.rle import rle_crop, rle_decode
from models.instances import RLE, Instances
from pipelines.data.dataset import Sample

# x1, y1, x2, y2 in whole pixels.
Window = tuple[int, int, int, int]

TRUTH = (64, 220, 96)
PREDICTED = (255, 176, 0)


def draw_instances(image: np.ndarray, instances: Instances, thickness: int | None = None) -> np.ndarray:
    """A copy of the RGB image with boxes, outlines and scores drawn in, lines ``thickness`` pixels wide."""
    canvas, colour = image.copy(), PREDICTED
    thickness = thickness or _line_width(image)
    for i, box in enumerate(instances.boxes):
        x1, y1, x2, y2 = (int(round(float(v))) for v in box)
        if instances.masks is None:
            cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)
        else:
            _outline(canvas, instances.masks[i], colour, thickness)
        label = f"{instances.scores[i]:.2f}"
        cv2.putText(canvas, label, (x1, max(y1 - 3, 10)), cv2.FONT_HERSHEY_SIMPLEX, 0.36 * thickness, colour, thickness)
    return canvas


def draw_truth(image: np.ndarray, sample: Sample, thickness: int | None = None) -> np.ndarray:
    """A copy of the RGB image with the annotated planes drawn in, as outlines where there are any."""
    canvas = image.copy()
    thickness = thickness or _line_width(image)
    for box, mask in zip(sample.boxes, sample.masks, strict=True):
        x1, y1, x2, y2 = (int(round(float(v))) for v in box)
        if mask is None:
            cv2.rectangle(canvas, (x1, y1), (x2, y2), TRUTH, thickness)
        else:
            _outline(canvas, mask, TRUTH, thickness)
    return canvas


def _line_width(image: np.ndarray) -> int:
    return max(1, round(max(image.shape[:2]) / 900))


def _outline(canvas: np.ndarray, mask: RLE, colour: tuple[int, int, int], thickness: int) -> None:
    cropped, left, top = rle_crop(mask)
    if not cropped.size:
        return
    contours, _ = cv2.findContours(cropped.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=(left, top))
    cv2.drawContours(canvas, contours, -1, colour, thickness)


def draw_window(
    image: np.ndarray, window: Window, sample: Sample, instances: Instances, side: int | None = None
) -> np.ndarray:
    """The window of an RGB uint8 image with truth and predictions drawn in, scores beside boxes without an outline.

    Args:
        side: longer side of the result in pixels; that of the window without it.
    """
    x1, y1, x2, y2 = window
    scale = side / max(x2 - x1, y2 - y1) if side else 1.0
    width, height = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = cv2.resize(image[y1:y2, x1:x2], (width, height), interpolation=kind)
    masks: Sequence[RLE | None] = instances.masks or [None] * len(instances)
    labels = [f"{s:.2f}" if m is None else "" for s, m in zip(instances.scores, masks, strict=True)]
    planes = [(b, m, TRUTH, "") for b, m in zip(sample.boxes, sample.masks, strict=True)]
    planes += [(b, m, PREDICTED, t) for b, m, t in zip(instances.boxes, masks, labels, strict=True)]
    for box, mask, colour, label in planes:
        if not (box[0] < x2 and box[1] < y2 and box[2] > x1 and box[3] > y1):
            continue
        left, top, right, bottom = (round(float(v - o) * scale) for v, o in zip(box, (x1, y1, x1, y1), strict=True))
        if mask is None:
            cv2.rectangle(canvas, (left, top), (right, bottom), colour, 1)
            cv2.putText(canvas, label, (left, max(top - 3, 10)), cv2.FONT_HERSHEY_SIMPLEX, 0.36, colour, 1)
        else:
            shown = cv2.resize(_mask_in(mask, window), (width, height), interpolation=cv2.INTER_NEAREST)
            contours, _ = cv2.findContours(shown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(canvas, contours, -1, colour, 1)
    return canvas


def _mask_in(mask: RLE, window: Window) -> np.ndarray:
    """The part of a mask that a window shows, uint8 of the window's size; no mask of the whole image is made."""
    x1, y1, x2, y2 = window
    cropped, left, top = rle_crop(mask)
    shown = np.zeros((y2 - y1, x2 - x1), np.uint8)
    a, b = max(left, x1), max(top, y1)
    c, d = min(left + cropped.shape[1], x2), min(top + cropped.shape[0], y2)
    if a < c and b < d:
        shown[b - y1 : d - y1, a - x1 : c - x1] = cropped[b - top : d - top, a - left : c - left]
    return shown


def image_sheet(rows: Sequence[tuple[np.ndarray, Sample, Instances]], width: int = 620) -> np.ndarray:
    """Rows of image | truth | prediction, RGB uint8; planes below a score of 0.5 are left out."""
    lines = []
    for image, sample, instances in rows:
        # Wide enough to be seen once the image is shrunk to its panel.
        line = 1 + round(image.shape[1] / width)
        panels = [image, draw_truth(image, sample, line), draw_instances(image, instances.above(0.5), line)]
        height = round(width * image.shape[0] / image.shape[1])
        lines.append(np.hstack([_panel(p, width, height) for p in panels]))
    sheet = np.vstack(lines or [np.full((26, 3 * width, 3), 255, np.uint8)])
    return _with_header(sheet, ["image", "truth", "prediction"], width)


def crop_sheet(
    rows: Sequence[tuple[np.ndarray, np.ndarray, RLE, RLE, float]], side: int = 180, across: int = 3
) -> np.ndarray:
    """Triples of crop | true mask | predicted mask with the IoU, ``across`` planes a line, RGB uint8.

    Each row is (image, box xyxy, truth RLE, predicted RLE, IoU).
    """
    cells = []
    for image, box, truth, guess, iou in rows:
        x1, y1, x2, y2 = crop_window(box, *image.shape[:2])
        masks = [np.repeat(rle_decode(m)[y1:y2, x1:x2, None].astype(np.uint8) * 255, 3, 2) for m in (truth, guess)]
        cell = np.hstack([_panel(p, side, side) for p in (image[y1:y2, x1:x2], *masks)])
        cv2.putText(cell, f"IoU {iou:.2f}", (2 * side + 6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, PREDICTED, 1, cv2.LINE_AA)
        cells.append(cell)
    while len(cells) % across:
        cells.append(np.full_like(cells[0], 255))
    lines = [np.hstack(cells[i : i + across]) for i in range(0, len(cells), across)]
    sheet = np.vstack(lines or [np.full((26, 3 * side * across, 3), 255, np.uint8)])
    return _with_header(sheet, ["image", "truth", "prediction"] * across, side)


def _panel(image: np.ndarray, width: int, height: int) -> np.ndarray:
    shrinks = image.shape[1] > width
    resized = cv2.resize(image, (width - 4, height - 4), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return cv2.copyMakeBorder(resized, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _with_header(sheet: np.ndarray, titles: Sequence[str], width: int) -> np.ndarray:
    header = np.full((26, sheet.shape[1], 3), 255, np.uint8)
    for i, title in enumerate(titles):
        cv2.putText(header, title, (i * width + 6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    return np.vstack([header, sheet])
