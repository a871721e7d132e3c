"""Predictions and truth to COCO's twelve numbers, IoU and Dice; pure functions, no MLflow."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from tabulate import tabulate

from models.errors import DataError, RecipeError
from models.geometry.boxes import xyxy_to_xywh
from models.geometry.rle import rle_iou, rle_text
from models.instances import RLE, Instances
from pipelines.data.dataset import Dataset

MASK_METRICS = ("IoU", "Dice", "IoU_min", "IoU_median", "IoU_above_75")
# The order in which COCOeval prints its twelve numbers.
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def check_metric(metric: str, kind: str) -> None:
    """Refuse a metric that models of a kind do not have.

    Raises:
        RecipeError: the kind has others.
    """
    known = list(MASK_METRICS if kind == "segmenter" else COCO_METRICS)
    known += [f"mask_{name}" for name in COCO_METRICS] if kind == "instance_segmenter" else []
    if metric not in known:
        raise RecipeError(f"metric {metric}: a {kind.replace('_', ' ')} has none of that name; known: {', '.join(known)}")


# COCO's size classes: least and largest area of a plane in pixels.
SIZE_CLASSES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}


@dataclass(frozen=True)
class Evaluation:
    """Numbers with the settings they were made at; a metric is NaN where there is no truth for it."""

    metrics: dict[str, float]
    settings: dict[str, Any]

    def finite(self, prefix: str = "") -> dict[str, float]:
        """The metrics that exist, their names prefixed, for logging."""
        return {prefix + k: v for k, v in self.metrics.items() if math.isfinite(v)}


def evaluate_instances(
    dataset: Dataset,
    predictions: Sequence[Instances],
    kind: Literal["bbox", "segm"] = "bbox",
    *,
    score_threshold: float = 0.05,
    max_dets: tuple[int, int, int] = (1, 10, 100),
) -> Evaluation:
    """COCO's twelve numbers of predictions against a data set with truth.

    Only predictions with a score of at least ``score_threshold`` count; images
    without predictions need no entry. Computed by faster-coco-eval.

    Raises:
        DataError: the data set has no truth (or no masks, for ``segm``), or predictions
            for images that it does not have.
    """
    if not dataset.has_truth:
        raise DataError(f"{dataset.name}: no ground truth to evaluate against")
    if kind == "segm" and not dataset.has_masks and dataset.planes:
        raise DataError(f"{dataset.name}: planes have no outlines, so masks cannot be evaluated")
    planes = dataset.planes
    dataset = dataset.for_masks() if kind == "segm" else dataset
    numbers = {s.image_id: i for i, s in enumerate(dataset.samples, start=1)}
    unknown = [p.image_id for p in predictions if p.image_id not in numbers]
    if unknown:
        raise DataError(f"{dataset.name}: predictions for an image that it does not have ({unknown[0]})")
    truth = COCO(dataset.to_coco())
    results = coco_results([p.above(score_threshold) for p in predictions], numbers, kind)
    settings = {
        "kind": kind,
        "score_threshold": score_threshold,
        "max_dets": list(max_dets),
        "data": dataset.name,
        "split": dataset.split,
        "digest": dataset.digest(),
        "images": len(dataset),
        "planes": planes,
        "ignored": planes - dataset.planes,
        "predictions": len(results),
    }
    if not results:
        stats = _without_predictions(truth.dataset["annotations"])
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval_faster(truth, truth.loadRes(results), iouType=kind)
            evaluator.params.maxDets = list(max_dets)
            evaluator.run()
        stats = [float(v) if v > -1 else math.nan for v in evaluator.stats[: len(COCO_METRICS)]]
    return Evaluation(dict(zip(COCO_METRICS, stats, strict=True)), settings)


def _without_predictions(annotations: Sequence[Mapping[str, Any]]) -> list[float]:
    """0 for each number that there is truth for, else NaN, in the order of COCO_METRICS."""
    areas = [a["area"] for a in annotations if not a["iscrowd"]]
    classes = [[a for a in areas if low <= a <= high] for low, high in SIZE_CLASSES.values()]
    all_and_sizes = [math.nan if not size else 0.0 for size in (areas, *classes)]
    total, small, medium, large = all_and_sizes
    return [total, total, total, small, medium, large, total, total, total, small, medium, large]


def coco_tables(evaluation: Evaluation) -> str:
    """The numbers in per cent as Detectron2 prints them, six of AP and six of AR, under the settings they were made at."""
    settings = evaluation.settings
    failed = f" ({settings['images_failed']} failed, taken for empty)" if settings.get("images_failed") else ""
    title = (
        f"Evaluation results for {settings['kind']}: {settings['data']} {settings['split']}, "
        f"{settings['images']} images{failed}, "
        f"score >= {settings['score_threshold']:g}, maxDets {settings['max_dets'][-1]}"
    )
    tables = [
        tabulate(
            [[100 * evaluation.metrics[name] for name in names]],
            headers=names,
            tablefmt="pipe",
            floatfmt=".3f",
            stralign="center",
            numalign="center",
        )
        for names in (COCO_METRICS[:6], COCO_METRICS[6:])
    ]
    return "\n".join([title, *tables])


def coco_results(
    predictions: Sequence[Instances], numbers: Mapping[str, int], kind: Literal["bbox", "segm"]
) -> list[dict[str, Any]]:
    """COCO results entries (category 1), image ids taken from ``numbers``."""
    results = []
    for instances in predictions:
        for i, box in enumerate(xyxy_to_xywh(instances.boxes)):
            entry: dict[str, Any] = {"image_id": numbers[instances.image_id], "category_id": 1}
            entry["score"] = float(instances.scores[i])
            entry["bbox"] = box.tolist()
            if kind == "segm":
                if instances.masks is None:
                    raise DataError(f"{instances.image_id}: predictions have no masks to evaluate")
                entry["segmentation"] = rle_text(instances.masks[i])
                del entry["bbox"]
            results.append(entry)
    return results


def instance_ious(dataset: Dataset, masks: Sequence[Sequence[RLE]]) -> np.ndarray:
    """IoU of each annotated plane (crowds left out) with the mask predicted in its box, float64 (N,).

    ``masks[i][j]`` belongs to box j of image i; where image i could not be predicted there are none, and
    its planes have an IoU of 0.
    """
    values = []
    for sample, predicted in zip(dataset.samples, masks, strict=True):
        guesses: Sequence[RLE | None] = predicted or [None] * len(sample.masks)
        for truth, guess, crowd in zip(sample.masks, guesses, sample.crowd, strict=True):
            if truth is not None and not crowd:
                values.append(0.0 if guess is None else float(rle_iou([guess], [truth])[0, 0]))
    return np.array(values)


def evaluate_masks(dataset: Dataset, masks: Sequence[Sequence[RLE]]) -> Evaluation:
    """Mean IoU, mean Dice and the spread of IoU over outlined planes, at the images' own resolution; NaN without any.

    Raises:
        DataError: the planes have no outlines.
    """
    if not dataset.has_masks and dataset.planes:
        raise DataError(f"{dataset.name}: planes have no outlines (segmentation) to evaluate against")
    ious = instance_ious(dataset, masks)
    dice = 2 * ious / (1 + ious)
    settings = {
        "kind": "crop masks",
        "data": dataset.name,
        "split": dataset.split,
        "digest": dataset.digest(),
        "images": len(dataset),
        "planes": len(ious),
    }
    if not len(ious):
        return Evaluation(dict.fromkeys(MASK_METRICS, math.nan), settings)
    values = (ious.mean(), dice.mean(), ious.min(), np.median(ious), (ious >= 0.75).mean())
    metrics = dict(zip(MASK_METRICS, values, strict=True))
    return Evaluation({k: float(v) for k, v in metrics.items()}, settings)
