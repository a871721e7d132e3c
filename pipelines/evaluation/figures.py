"""Curves, overlays and sample sheets; matplotlib and OpenCV, returned as figures or RGB arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from models.geometry.boxes import crop_window
from models.geometry.rle import rle_crop, rle_decode
from models.instances import RLE, Instances
from pipelines.data.dataset import Sample

TRUTH = (64, 220, 96)
PREDICTED = (255, 176, 0)


def loss_figure(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss per step with its running mean, learning rate, and the validation metrics below."""
    steps = np.array([r["step"] for r in history])
    losses = np.array([r["train/loss"] for r in history])
    metrics = sorted({k for r in history for k in r if k in ("val/AP", "val/AP50", "val/IoU", "val/Dice")})
    figure = Figure(figsize=(8, 6.4 if metrics else 4), layout="constrained")
    axes = figure.subplots(2 if metrics else 1, 1, sharex=True, squeeze=False)[:, 0]
    width = max(1, len(losses) // 25)
    axes[0].plot(steps, losses, color="#9db4c8", linewidth=0.8, label="loss")
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    axes[0].plot(steps[width - 1 :], smooth, color="#1f4e79", label=f"mean of {width} steps")
    axes[0].set(ylabel="training loss", title=title, ylim=(0, None))
    rate = axes[0].twinx()
    rate.plot(steps, [r["lr"] for r in history], color="#c26a1b", linewidth=0.9, linestyle="--", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    more, names = rate.get_legend_handles_labels()
    axes[0].legend(handles + more, labels + names, loc="upper right")
    if metrics:
        for name in metrics:
            points = [(r["step"], r[name]) for r in history if name in r]
            axes[1].plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("val/"))
        axes[1].set(ylabel="validation", ylim=(0, 1))
        axes[1].legend(loc="lower right")
        axes[1].grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return figure


def ablation_figure(
    bars: Sequence[tuple[str, float]],
    metric: str,
    losses: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    validation: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    validated: str,
) -> Figure:
    """Variants side by side: bars of the deciding metric, smoothed training loss, validation; one colour each.

    ``losses`` and ``validation`` are steps and values by the variant's label.
    """
    panels = 3 if any(len(steps) for steps, _ in validation.values()) else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    colours = {label: f"C{i % 10}" for i, (label, _) in enumerate(bars)}
    values = [0.0 if np.isnan(v) else v for _, v in bars]
    drawn = axes[0].barh(range(len(bars)), values, color=list(colours.values()))
    axes[0].bar_label(drawn, ["failed" if np.isnan(v) else f"{v:.3f}" for _, v in bars], padding=3)
    axes[0].set_yticks(range(len(bars)), [label for label, _ in bars])
    axes[0].invert_yaxis()
    axes[0].set(xlabel=metric, xlim=(0, max([*values, 0.05]) * 1.18), title="result")
    for label, (steps, loss) in losses.items():
        width = max(1, len(loss) // 25)
        smooth = np.convolve(loss, np.ones(width) / width, "valid") if len(loss) else np.zeros(0)
        axes[1].plot(steps[width - 1 :] if len(loss) else [], smooth, color=colours[label], label=label)
    axes[1].set(xlabel="step", ylabel="training loss (running mean)", ylim=(0, None), title="training")
    axes[1].legend()
    if panels == 3:
        for label, (steps, numbers) in validation.items():
            axes[2].plot(steps, numbers, color=colours[label], marker="o", label=label)
        axes[2].set(xlabel="step", ylabel=validated, ylim=(0, None), title="validation")
        axes[2].grid(alpha=0.3)
    return figure


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
