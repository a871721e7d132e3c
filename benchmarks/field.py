"""A field of thousands of planes in one large GeoTIFF: count, recall, time and peak memory.

Without --model the planes are painted in one colour and detected by that colour, so that what
is measured is tiling, merging and memory. With a saved model or a registered version they
are drawn as in the synthetic airfield and the `score` command finds them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import rasterio
from rasterio.transform import from_origin

from models.geometry.rle import rle_encode
from models.images.windows import WindowedImage
from models.instances import Instances
from models.tiling.matching import greedy_match
from models.tiling.predictor import Tiled
from models.tiling.settings import Tiling
from pipelines.data.synthetic.aircraft import draw_aircraft, random_aircraft
from pipelines.data.synthetic.scenes import AirfieldSettings, draw_scene
from scoring.writers.parquet import read_instances, write_instances

PAINT = np.array([255, 0, 255], np.uint8)
GROUND = 1000


class ByColour:
    """Every connected patch of PAINT is a plane."""

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """See `models.predictor.Predictor`."""
        return [self._one(str(i), image) for i, image in enumerate(images)]

    def _one(self, image_id: str, image: np.ndarray) -> Instances:
        painted = (image == PAINT).all(axis=2).astype(np.uint8)
        count, components, stats, _ = cv2.connectedComponentsWithStats(painted, connectivity=8)
        boxes = [[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:count]]
        masks = [rle_encode(components == i) for i in range(1, count)]
        return Instances.make(image_id, image.shape[0], image.shape[1], boxes, np.full(count - 1, 0.9), masks=masks)


def plane_patch(rng: np.random.Generator, light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A random plane: coverage (h, w) and colour (h, w, 3), without the empty rows and columns around it."""
    patch = draw_aircraft(random_aircraft(rng), (0.0, 0.0), float(rng.uniform(30, 110)), rng.uniform(0, 2 * np.pi), light)
    rows, columns = (np.flatnonzero((patch.coverage > 0).any(axis=axis)) for axis in (1, 0))
    inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return patch.coverage[inside], patch.colour[inside]


def draw_field(path: Path, size: int, planes: int, painted: bool) -> np.ndarray:
    """Write a tiled GeoTIFF strip by strip, one plane in each cell of a grid; return their boxes (N, 4)."""
    rng = np.random.default_rng(0)
    across = int(np.ceil(planes**0.5))
    cell = size // across
    empty = AirfieldSettings(size=GROUND, planes_min=0, planes_max=0)
    grounds = [draw_scene(empty, "test", i).image for i in range(4)]
    light = np.array([0.6, 0.8])
    boxes: list[list[float]] = []
    profile = {"driver": "GTiff", "count": 3, "height": size, "width": size, "dtype": "uint8", "photometric": "RGB"}
    blocks = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "zlevel": 1, "bigtiff": "yes"}
    where = {"crs": "EPSG:32633", "transform": from_origin(400_000, 5_800_000, 0.3, 0.3)}
    with rasterio.open(path, "w", **profile, **blocks, **where) as file:
        for row in range(across + 1):
            height = min(cell, size - row * cell)
            if height <= 0:
                break
            lines = np.arange(row * cell, row * cell + height) % GROUND
            pieces = [grounds[(row + i) % 4][lines] for i in range(-(-size // GROUND))]
            strip = np.ascontiguousarray(np.concatenate(pieces, axis=1)[:, :size])
            for column in range(across if row < across else 0):
                if len(boxes) == planes:
                    break
                cover, colour = plane_patch(rng, light)
                rows, columns = cover.shape
                left = column * cell + int(rng.integers(2, cell - columns - 2))
                top = int(rng.integers(2, cell - rows - 2))
                region = strip[top : top + rows, left : left + columns]
                mask = cover >= 0.5
                drawn = region * (1 - cover[:, :, None]) + colour * cover[:, :, None]
                region[:] = np.where(mask[:, :, None], PAINT, region) if painted else drawn.round().clip(0, 255)
                ys, xs = np.nonzero(mask)
                top += row * cell
                boxes.append([left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1])
            file.write(strip.transpose(2, 0, 1), window=((row * cell, row * cell + height), (0, size)))
    return np.array(boxes, np.float64)


def detect_by_colour(image: Path, tile: int, out: Path) -> None:
    """Detect planes by their colour and write the instance table; the child process does this."""
    detections = Tiled(ByColour(), Tiling(size=tile, overlap=0.25)).predict([WindowedImage(image)])[0]
    write_instances([detections.named(image.stem)], out)


def matched(truth: np.ndarray, detections: Instances) -> int:
    """How many true boxes have a detected one at an IoU of 0.5, each used once, best score first."""
    boxes = np.concatenate([detections.boxes.astype(np.float64), truth])
    owner = greedy_match(boxes, np.arange(len(boxes)), np.zeros(len(boxes)), threshold=0.5)
    return int((owner[len(detections) :] < len(detections)).sum())


def _measured(command: Sequence[str]) -> tuple[float, float]:
    """Run a command: seconds, and its peak memory in GiB."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.monotonic() - started, usage.ru_maxrss / 1024**2


def main() -> None:
    """Print the number of detections, recall and precision, how fast, and with how much memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--planes", type=int, default=5_000)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--model", default=None)
    parser.add_argument("--folder", type=Path, default=Path("data/field"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder, painted = options.folder, options.model is None
    image = folder / f"field-{options.size}-{options.planes}{'-painted' if painted else ''}.tif"
    table = folder / "scored" / "instances.parquet"
    if options.child:
        table.parent.mkdir(parents=True, exist_ok=True)
        detect_by_colour(image, options.tile, table)
        return
    folder.mkdir(parents=True, exist_ok=True)
    truth_file = image.with_suffix(".json")
    if not truth_file.exists():
        # In a process of its own: what it takes would count as the peak of every process started after it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            drawn = pool.submit(draw_field, image, options.size, options.planes, painted).result()
        truth_file.write_text(json.dumps(drawn.tolist()))
    truth = np.array(json.loads(truth_file.read_text()))
    if painted:
        child = [sys.executable, "-m", "benchmarks.field", *sys.argv[1:], "--child"]
    else:
        out = ("--data", str(image), "--out", str(folder / "out"), "--overlays", "1", "--score-threshold", "0.3")
        child = [sys.executable, "-m", "scoring.cli", "--model", options.model, *out, "--tile", str(options.tile)]
    seconds, peak = _measured(child)
    if not painted:
        table = max((folder / "out").glob("*/instances.parquet"), key=lambda p: p.stat().st_mtime)
    detections = read_instances(table)[0]
    hits = matched(truth, detections)
    print(f"{len(truth)} planes in {options.size} x {options.size} pixels, tiles of {options.tile}")
    print(
        f"found {len(detections)}, recall {hits / len(truth):.4f}, precision {hits / max(len(detections), 1):.4f} (IoU 0.5)"
    )
    print(f"{seconds:.0f} s, peak memory {peak:.2f} GiB (the decoded image alone: {3 * options.size**2 / 1024**3:.2f} GiB)")


if __name__ == "__main__":
    main()
