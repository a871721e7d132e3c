"""COCO evaluation here against pycocotools on the same predictions, alternating, medians of the ratios."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.metrics import coco_results, evaluate_instances

IMAGES, PLANES, SIZE, ROUNDS = 200, 40, 1000, 3


def make_case() -> tuple[Dataset, list[Instances]]:
    """Random planes and jittered guesses."""
    rng = np.random.default_rng(0)
    samples, predictions = [], []
    for i in range(IMAGES):
        corner = rng.uniform(0, SIZE - 120, (PLANES, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(15, 115, (PLANES, 2))], 1).astype(np.float32)
        empty = np.zeros(PLANES, bool)
        samples.append(
            Sample(
                f"i{i}", Path("-"), height=SIZE, width=SIZE, scene=f"i{i}", boxes=boxes, masks=(None,) * PLANES, crowd=empty
            )
        )
        guesses = boxes + rng.normal(0, 4, boxes.shape)
        predictions.append(Instances.make(f"i{i}", SIZE, SIZE, guesses, rng.random(PLANES)))
    return Dataset("case", Path("-"), "test", "plane", tuple(samples)), predictions


def reference(data: Dataset, predictions: list[Instances]) -> float:
    """AP by pycocotools."""
    truth = COCO()
    truth.dataset = data.to_coco()
    truth.createIndex()
    numbers = {s.image_id: i for i, s in enumerate(data.samples, start=1)}
    evaluator = COCOeval(truth, truth.loadRes(coco_results(predictions, numbers, "bbox")), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return float(evaluator.stats[0])


def timed(function, *arguments) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """(seconds, result) of one call."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = function(*arguments)
    return time.perf_counter() - started, result


def main() -> None:
    """Print seconds and ratio."""
    data, predictions = make_case()
    with mock.patch.object(Dataset, "digest", return_value="0"):
        pairs = [
            (
                timed(lambda: evaluate_instances(data, predictions, score_threshold=0.0).metrics["AP"]),
                timed(reference, data, predictions),
            )
            for _ in range(ROUNDS)
        ]
    ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
    print(f"{IMAGES} images, {IMAGES * PLANES} boxes, {ROUNDS} rounds")
    print(f"this project   {statistics.median(p[0][0] for p in pairs):.3f} s   AP {pairs[0][0][1]:.6f}")
    print(f"pycocotools    {statistics.median(p[1][0] for p in pairs):.3f} s   AP {pairs[0][1][1]:.6f}")
    print(f"ratio          {ratio:.3f}")


if __name__ == "__main__":
    main()
