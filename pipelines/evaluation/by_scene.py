"""Predictions for many scenes against truth, scene by scene."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from models.instances import Instances
from pipelines.data.dataset import Dataset
from pipelines.evaluation.matching import Kind, Ranked, match_image
from pipelines.evaluation.metrics import evaluate_masks

# The score at which precision and recall are said.
SHOWN_SCORE = 0.5


def scene_metrics(
    dataset: Dataset, predictions: Sequence[Instances], kind: str, *, score_threshold: float = 0.05
) -> dict[str, dict[str, float]]:
    """Scene -> its images, planes, and metrics; NaN where a scene has no planes to measure.

    Detectors: AP, AP50, and precision and recall of the boxes at `SHOWN_SCORE`; instance segmenters: the same of the
    masks where the data has outlines, planes being those with one; crop segmenters: IoU. Images without an entry have
    no detections.

    Args:
        kind: detector, segmenter or instance_segmenter.
    """
    by_id = {p.image_id: p for p in predictions}
    scenes = sorted({s.scene for s in dataset.samples})
    return {scene: _of_scene(dataset, by_id, scene, kind, score_threshold) for scene in scenes}


def _of_scene(
    dataset: Dataset, by_id: dict[str, Instances], scene: str, kind: str, score_threshold: float
) -> dict[str, float]:
    masks = kind == "instance_segmenter" and dataset.has_masks
    part = dataset.subset([s.image_id for s in dataset.samples if s.scene == scene], dataset.split)
    part = replace(part, samples=tuple(s.for_masks() for s in part.samples)) if masks else part
    counts = {"images": float(len(part)), "planes": float(part.planes)}
    if kind == "segmenter":
        crops = [list(by_id[s.image_id].masks or ()) if s.image_id in by_id else [] for s in part.samples]
        return counts | {"IoU": evaluate_masks(part, crops).metrics["IoU"] if part.has_masks else math.nan}
    shape: Kind = "segm" if masks else "bbox"
    matches = []
    for sample in part.samples:
        found = by_id.get(sample.image_id) or Instances.empty(sample.image_id, sample.height, sample.width, masks=True)
        matches.append(match_image(sample, found.above(score_threshold), shape))
    planes = sum(m.planes for m in matches)
    curve = Ranked(matches).curve()
    counted = [(m.scores >= SHOWN_SCORE) & ~m.ignored[0] for m in matches]
    right = sum(int((m.correct[0] & c).sum()) for m, c in zip(matches, counted, strict=True))
    shown = sum(int(c.sum()) for c in counted)
    values = (
        {"AP": float(curve.mean()), "AP50": float(curve[0].mean())} if planes else dict.fromkeys(("AP", "AP50"), math.nan)
    )
    values |= {"precision": right / shown if shown else math.nan, "recall": right / planes if planes else math.nan}
    return counts | values


def worst_first(scenes: dict[str, dict[str, float]], metric: str) -> list[str]:
    """Names of the scenes by a metric, the least first; those without it last."""
    return sorted(scenes, key=lambda s: (not math.isfinite(scenes[s][metric]), np.nan_to_num(scenes[s][metric]), s))
