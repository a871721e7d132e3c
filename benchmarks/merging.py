"""Merging of the detections of tiles: `models.tiling.merging.merge_tiles` as it ships against SAHI's functions.

A field of 20,000 x 20,000 pixels with planes of 20 to 90 pixels, alone or in clusters, is seen by overlapping tiles:
each tile detects, a little off, the visible share of each plane. Both sides get the same detections; SAHI is timed with
every backend that is installed (its first call, which may compile, is not counted) and its fastest one is compared.
The two do not do the same: ours joins the detections of a cut plane and tells them from its neighbours by the region
that both tiles show, so the numbers of planes that are left are printed beside the truth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sized
from importlib.util import find_spec

import numpy as np
from sahi.postprocess.backends import set_postprocess_backend
from sahi.postprocess.combine import greedy_nmm, nmm, nms

from models.instances import Instances
from models.tiling.merging import TileResult, merge_tiles
from models.tiling.settings import Tiling, tile_grid

ROUNDS, SIDE = 5, 20_000
BACKENDS = ("numpy", *(name for name in ("numba", "torchvision") if find_spec(name)))


def planes(count: int, clustered: bool) -> np.ndarray:
    """Boxes xyxy (N, 4) of planes, alone or in clusters of 50 whose boxes overlap."""
    rng = np.random.default_rng(0)
    if clustered:
        centres = np.repeat(rng.uniform(300, SIDE - 300, (count // 50, 2)), 50, axis=0) + rng.normal(0, 120, (count, 2))
    else:
        centres = rng.uniform(100, SIDE - 100, (count, 2))
    sides = rng.uniform(20, 90, (count, 2))
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).clip(0, SIDE)


def detect_in_tiles(boxes: np.ndarray, tiling: Tiling) -> list[TileResult]:
    """Detections of each tile: boxes cut at its borders, half a pixel off, those of which a third is visible."""
    rng = np.random.default_rng(1)
    tile_results = []
    for window in tile_grid(SIDE, SIDE, tiling):
        x1, y1, x2, y2 = window
        near = boxes[(boxes[:, 2] > x1) & (boxes[:, 0] < x2) & (boxes[:, 3] > y1) & (boxes[:, 1] < y2)]
        cut = near.clip([x1, y1, x1, y1], [x2, y2, x2, y2])
        seen = np.prod(cut[:, 2:] - cut[:, :2], axis=1) / np.prod(near[:, 2:] - near[:, :2], axis=1)
        shown = (cut + rng.normal(0, 0.5, cut.shape))[seen > 1 / 3] - [x1, y1, x1, y1]
        detections = Instances.make("", y2 - y1, x2 - x1, shown, rng.uniform(0.3, 1, len(shown)))
        if len(detections):
            tile_results.append(TileResult(detections, window))
    return tile_results


def timed(function: Callable[[], Sized]) -> tuple[float, Sized]:
    """(seconds, result) of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def best_of_sahi(function: Callable[[], Sized]) -> str:
    """The fastest backend of one of SAHI's functions, each called once to compile and once for its time."""
    seconds = {}
    for backend in BACKENDS:
        set_postprocess_backend(backend)
        function()
        seconds[backend] = timed(function)[0]
    return min(seconds, key=seconds.__getitem__)


def main() -> None:
    """Print seconds, ratios and how many planes are left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planes", type=int, default=25_000)
    count = parser.parse_args().planes
    print(f"backends of SAHI: {', '.join(BACKENDS)}; {ROUNDS} rounds, medians")
    for clustered in (False, True):
        truth = planes(count, clustered)
        for merge, functions in (("nms", {"NMS": nms}), ("join", {"GREEDYNMM": greedy_nmm, "NMM": nmm})):
            tiling = Tiling.model_validate({"size": 640, "overlap": 0.25, "merge": merge})
            tile_results = detect_in_tiles(truth, tiling)
            boxes = np.concatenate([r.instances.boxes + np.tile(r.window[:2], 2) for r in tile_results])
            scores = np.concatenate([r.instances.scores for r in tile_results])
            table = np.concatenate([boxes, scores[:, None], np.zeros((len(boxes), 1))], axis=1)
            for name, function in functions.items():

                def theirs(f: Callable = function, t: np.ndarray = table) -> Sized:
                    return f(t, "IOS", 0.5) if f is not nms else f(t, "IOU", 0.5)

                def ours(results: list[TileResult] = tile_results, how: Tiling = tiling) -> Sized:
                    return merge_tiles("", SIDE, SIDE, results, tiling=how)

                backend = best_of_sahi(theirs)
                set_postprocess_backend(backend)
                rounds = [(timed(ours), timed(theirs)) for _ in range(ROUNDS)]
                mine, other = (statistics.median(r[i][0] for r in rounds) for i in range(2))
                where = "in clusters" if clustered else "scattered"
                print(
                    f"{len(boxes)} detections of {count} planes {where:<12} {merge:<5} {mine:.3f} s   SAHI {name} "
                    f"({backend}) {other:.3f} s   ratio {mine / other:.3f}   left {len(rounds[0][0][1])} and "
                    f"{len(rounds[0][1][1])}"
                )


if __name__ == "__main__":
    main()
