"""A comparison of two versions over 2,000 images with its page, beside pycocotools' evaluation of the same two."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.evaluation import reference, timed
from models.geometry.rle import rle_paste
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from scoring.comparison.compare import Candidate, compare
from scoring.comparison.report import write_report

IMAGES, PLANES, SIZE = 2000, 12, 500


def make_case() -> tuple[Dataset, list[Candidate]]:
    """Random planes with masks, and two versions that find them more or less well."""
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    versions: tuple[list[Instances], list[Instances]] = ([], [])
    for i in range(IMAGES):
        corners = rng.uniform(0, SIZE - 100, (PLANES, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 90, (PLANES, 2))], 1).astype(np.float32)
        masks = [
            rle_paste(np.ones((int(b[3] - b[1]), int(b[2] - b[0])), bool), int(b[0]), int(b[1]), SIZE, SIZE) for b in boxes
        ]
        samples.append(
            Sample(
                f"i{i}",
                Path("-"),
                height=SIZE,
                width=SIZE,
                scene=f"i{i}",
                boxes=boxes,
                masks=tuple(masks),
                crowd=np.zeros(PLANES, bool),
            )
        )
        for predictions, noise in zip(versions, (1, 4), strict=True):
            guesses = (boxes + rng.normal(0, noise, boxes.shape)).clip(0, SIZE)
            predictions.append(Instances.make(f"i{i}", SIZE, SIZE, guesses, rng.uniform(0.2, 1, PLANES), masks=masks))
    return Dataset("many", Path("-"), "test", "plane", tuple(samples)), [
        Candidate(n, f) for n, f in zip("ab", versions, strict=True)
    ]


def main() -> None:
    """Print seconds and ratio."""
    data, candidates = make_case()
    with mock.patch.object(Dataset, "digest", return_value="0"), tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        write_report(compare(data, candidates), candidates, data, Path(folder) / "report.html")
        ours = time.perf_counter() - started
        theirs = sum(timed(reference, data, c.predictions)[0] for c in candidates)
    print(f"{IMAGES} images, {IMAGES * PLANES} planes, two versions")
    print(f"comparison with page (boxes and masks, 500 resamplings)   {ours:.1f} s")
    print(f"pycocotools, box AP of both alone                         {theirs:.1f} s   ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
