"""Merging of 50,000 boxes, ours against SAHI's own functions, scattered and in clusters, alternating."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from sahi.postprocess.backends import set_postprocess_backend
from sahi.postprocess.combine import greedy_nmm, nmm, nms

from models.merge import join, suppress

ROUNDS = 5


def boxes_of(count: int, clustered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random boxes of 20 to 90 pixels in 20,000 x 20,000, alone or in clusters of 50; (N, 4) and scores (N,)."""
    rng = np.random.default_rng(0)
    if clustered:
        centres = np.repeat(rng.uniform(100, 19_900, (count // 50, 2)), 50, axis=0) + rng.normal(0, 6, (count, 2))
    else:
        centres = rng.uniform(100, 19_900, (count, 2))
    sides = rng.uniform(20, 90, (count, 2))
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1), rng.uniform(0.05, 1, count)


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """(seconds, result) of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main() -> None:
    """Print seconds, ratios and whether the results are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, default=50_000)
    count = parser.parse_args().boxes
    set_postprocess_backend("numpy")
    labels = np.zeros(count, np.int64)
    print(f"{count} boxes, {ROUNDS} rounds, medians")
    for clustered in (False, True):
        boxes, scores = boxes_of(count, clustered)
        table = np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1)
        for name, ours, theirs in (
            ("NMS, IoU", lambda b=boxes, s=scores: suppress(b, s, labels, 0.5), lambda t=table: nms(t, "IOU", 0.5)),
            ("join, IoS", lambda b=boxes, s=scores: join(b, s, labels, 0.5), lambda t=table: greedy_nmm(t, "IOS", 0.5)),
            ("join, IoS (NMM)", lambda b=boxes, s=scores: join(b, s, labels, 0.5), lambda t=table: nmm(t, "IOS", 0.5)),
        ):
            rounds = [(timed(ours), timed(theirs)) for _ in range(ROUNDS)]
            mine, other = (statistics.median(r[i][0] for r in rounds) for i in range(2))
            kept = rounds[0][0][1]
            survivors = set((kept[0] if isinstance(kept, tuple) else kept).tolist())
            equal = survivors == set(rounds[0][1][1])
            where = "in clusters of 50" if clustered else "scattered"
            print(
                f"{name:<16} {where:<18} ours {mine:.3f} s   SAHI {other:.3f} s   ratio {mine / other:.3f}   "
                f"survivors {len(survivors)}, {'the same' if equal else f'SAHI {len(rounds[0][1][1])}'}"
            )


if __name__ == "__main__":
    main()
