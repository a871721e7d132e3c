"""A comparison as one HTML page that needs no network; computes nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.drawing import draw_instances, draw_truth
from pipelines.evaluation.matching import ERRORS, RECALLS
from pipelines.evaluation.metrics import COCO_METRICS
from pipelines.files import write_text
from scoring.comparison.compare import OF_GROUPS, SHOWN_SCORE, Candidate, Comparison, ImageDifference, deltas

TEMPLATES = Path(__file__).parent / "templates"
KIND_NAMES = {"bbox": "boxes", "segm": "outlines (masks)"}

# Pictures of more images would make the page heavy; the table lists more.
SHOWN_IMAGES = 8
LISTED_IMAGES = 40
PICTURE = 420


def write_report(comparison: Comparison, candidates: Sequence[Candidate], dataset: Dataset, path: Path) -> Path:
    """Write the page; pictures of images that cannot be read are left out."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["number"] = _number
    environment.filters["signed"] = _signed
    page = environment.get_template("report.html").render(
        title=" · ".join(comparison.labels),
        comparison=comparison,
        candidates=candidates,
        kind_names=KIND_NAMES,
        columns=COCO_METRICS,
        group_columns=OF_GROUPS,
        errors=("correct", *ERRORS),
        deltas={(k, c): deltas(comparison, k, c) for k in comparison.kinds for c in comparison.labels[1:]},
        curves={k: [_png(f) for f in _curve_figures(comparison, k)] for k in comparison.kinds},
        error_chart=_png(_error_figure(comparison)),
        listed=comparison.images[:LISTED_IMAGES],
        shown=_pictures(comparison, candidates, dataset),
        shown_score=SHOWN_SCORE,
        views=[(one.label, view) for one in candidates if (view := one.view(dataset)) is not None],
    )
    write_text(path, page)
    return path


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _jpeg(image: np.ndarray) -> str:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")


def _curve_figures(comparison: Comparison, kind: Any) -> list[Figure]:
    """One figure per IoU, so that they stand below each other on a narrow screen."""
    figures = []
    for row, name in ((0, "IoU 0.50"), (5, "IoU 0.75")):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, label in enumerate(comparison.labels):
            axes.plot(RECALLS, comparison.curves[kind][label][row], color=f"C{i}", label=label)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=f"Precision over recall, {name}")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
        figures.append(figure)
    return figures


def _error_figure(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(comparison.labels)
    for i, label in enumerate(comparison.labels):
        values = [comparison.errors[label][kind] for kind in ERRORS]
        bars = axes.bar(np.arange(len(ERRORS)) + (i + 0.5) * width - 0.4, values, width, color=f"C{i}", label=label)
        axes.bar_label(bars, padding=1, fontsize=8)
    axes.set_xticks(range(len(ERRORS)), [kind.replace(" ", "\n") for kind in ERRORS])
    axes.set(ylabel=f"number at score ≥ {SHOWN_SCORE:g}")
    axes.margins(y=0.12)
    axes.legend()
    return figure


def _pictures(comparison: Comparison, candidates: Sequence[Candidate], dataset: Dataset) -> list[dict[str, Any]]:
    samples = {s.image_id: s for s in dataset.samples}
    by_id = {c.label: {p.image_id: p for p in c.predictions} for c in candidates}
    entries = []
    for difference in comparison.images[:SHOWN_IMAGES]:
        sample = samples[difference.image_id]
        try:
            image = sample.read()
        except Exception:
            # A decoder may raise anything on a damaged file; a picture less must not cost the page.
            continue
        entries.append(
            {"difference": difference, "rows": _rows(image, sample, difference, by_id=by_id, labels=comparison.labels)}
        )
    return entries


def _rows(
    image: np.ndarray,
    sample: Sample,
    difference: ImageDifference,
    *,
    by_id: Mapping[str, Mapping[str, Instances]],
    labels: Sequence[str],
) -> list[list[tuple[str, str]]]:
    """Panels (caption, data URI): the whole image, and below it the place of the disagreement zoomed."""
    windows = [(0, 0, sample.width, sample.height)]
    if difference.box is not None:
        windows.append(_zoom(difference.box, sample))
    rows = []
    for x1, y1, x2, y2 in windows:
        scale = PICTURE / max(x2 - x1, y2 - y1)
        line = max(1, round(2 / scale)) if scale < 1 else 1
        panels = [("image", image), ("truth", draw_truth(image, sample, line))]
        for label in labels:
            instances = by_id[label].get(sample.image_id)
            drawn = image if instances is None else draw_instances(image, instances.above(SHOWN_SCORE), line)
            panels.append((label, drawn))
        rows.append([(name, _jpeg(_fit(panel[y1:y2, x1:x2], scale))) for name, panel in panels])
    return rows


def _zoom(box: Sequence[float], sample: Sample) -> tuple[int, int, int, int]:
    side = min(max(3 * max(box[2] - box[0], box[3] - box[1]), 96), sample.width, sample.height)
    x = min(max((box[0] + box[2] - side) / 2, 0), sample.width - side)
    y = min(max((box[1] + box[3] - side) / 2, 0), sample.height - side)
    return int(x), int(y), int(x + side), int(y + side)


def _fit(image: np.ndarray, scale: float) -> np.ndarray:
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
