"""A scoring job against the bare forward passes and a plain loop; its memory over ten times as many images."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch

from benchmarks.masks import timed
from benchmarks.tiles import random_model
from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.engines.torchvision.predictor import TorchvisionDetector, detector_spec
from models.loading import load_model
from models.predictor import Predictor
from models.runtime.devices import pick_device
from models.saved.folder import save_model
from pipelines.data.readers.opening import open_dataset
from pipelines.data.synthetic.scenes import AirfieldSettings, draw_scene
from scoring.jobs.job import run_job
from scoring.requests import JobSettings

CHUNKS, MANY = 4, 10


def write_images(folder: Path, count: int, smallest: int, largest: int) -> None:
    """Pieces of drawn scenes in mixed sizes and formats."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(AirfieldSettings(size=1024), "test", i).image for i in range(6)]
    folder.mkdir(parents=True)
    for i in range(count):
        height, width = rng.integers(smallest, largest + 1, 2)
        top, left = rng.integers(0, 1025 - height), rng.integers(0, 1025 - width)
        piece = scenes[i % len(scenes)][top : top + height, left : left + width]
        suffix = (".jpg", ".png", ".tif")[i % 3]
        cv2.imwrite(str(folder / f"{i:05}{suffix}"), cv2.cvtColor(piece, cv2.COLOR_RGB2BGR))


def score(predictor: Predictor, images: Path, out: Path, device: str = "cpu") -> None:
    """Our job, from listing to all tables."""
    run_job(
        predictor,
        "m/1",
        open_dataset(images),
        out,
        settings=JobSettings(overlays=0),
        progress=lambda r, *_: r,
        device=device,
    )


def plain_loop(predictor: Predictor, images: Path, out: Path) -> None:
    """What one writes without us: imread, predict, to_csv; nothing is safe before its end."""
    rows = []
    for path in sorted(images.iterdir()):
        read = cv2.imread(str(path))
        assert read is not None
        instances = predictor.predict([cv2.cvtColor(read, cv2.COLOR_BGR2RGB)])[0].above(0.05)
        rows += [(path.stem, *box, s) for box, s in zip(instances.boxes.tolist(), instances.scores.tolist(), strict=True)]
    pd.DataFrame(rows, columns=["image_id", "x1", "y1", "x2", "y2", "score"]).to_csv(out, index=False)


def speed(count: int, device: str) -> None:
    """Print seconds and ratios over images of 256 to 640 pixels a side."""
    work = Path(tempfile.mkdtemp())
    detector = load_model(random_model(work / "model"), device, {"size": 0})
    assert isinstance(detector, TorchvisionDetector)
    for chunk in range(CHUNKS):
        write_images(work / f"{chunk}", count // CHUNKS, 256, 640)
    seconds: dict[str, list[float]] = {"job": [], "bare": [], "loop": []}
    score(detector, work / "0", work / "warm", device)
    for chunk in range(CHUNKS):
        folder = work / f"{chunk}"
        tensors = [detector.tensors([s.read()])[0] for s in open_dataset(folder).samples]

        @torch.inference_mode()
        def bare(tensors: list[torch.Tensor] = tensors) -> None:
            for tensor in tensors:
                detector.model([tensor])

        ways: dict[str, Callable[[], object]] = {"bare": bare}
        ways["job"] = partial(score, detector, folder, folder.with_suffix(".out"), device)
        ways["loop"] = partial(plain_loop, detector, folder, folder.with_suffix(".csv"))
        # In turn, so that a machine that slows down slows all of them.
        names = list(ways)
        for name in (*names[chunk % 3 :], *names[: chunk % 3]):
            seconds[name].append(timed(ways[name])[0])
    total = {name: sum(values) for name, values in seconds.items()}
    print(
        f"{count} images of 256 to 640 pixels a side, {device}, {torch.get_num_threads()} threads, {CHUNKS} chunks in turn"
    )
    print(f"score job                  {total['job']:.2f} s   {count / total['job']:.2f} images/s")
    for name, what in (("bare", "bare forward passes"), ("loop", "imread, predict, to_csv")):
        ratios = [a / b for a, b in zip(seconds["job"], seconds[name], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}"
        print(f"{what:<26} {total[name]:.2f} s   ratio {total['job'] / total[name]:.3f}   (by chunks {spread})")


def small_model(folder: Path) -> Path:
    """A detector with random weights that takes a few hundredths of a second."""
    torch.manual_seed(0)
    layers: dict[str, Any] = {
        "backbone": "resnet18",
        "norm": "batch",
        "levels": [2, 3],
        "fpn_channels": 32,
        "head_channels": 64,
    }
    more: dict[str, Any] = {"anchor_sizes": [[16], [32], [64]], "min_size": None, "proposals": 100}
    architecture = DetectorArchitecture(**layers, **more)
    return save_model(folder, detector_spec(architecture, ["plane"]), build_detector(architecture, 1).state_dict())


# In a process of its own, whose peak is the job's.
MEASURED = """
import sys
from pathlib import Path
from benchmarks.scoring import score
from models.loading import load_model
from scoring.runners.local import peak_memory
score(load_model(sys.argv[1], "cpu"), Path(sys.argv[2]), Path(sys.argv[3]))
print(peak_memory() / 2**20)
"""


def memory(count: int) -> None:
    """Print the peak memory of processes that score ``count`` images and ten times as many."""
    work = Path(tempfile.mkdtemp())
    model = small_model(work / "model")
    write_images(work / "many", count * MANY, 96, 320)
    (work / "few").mkdir()
    for path in sorted((work / "many").iterdir())[:count]:
        (work / "few" / path.name).hardlink_to(path)
    peaks = []
    for name in ("few", "many"):
        command = [sys.executable, "-c", MEASURED, str(model), str(work / name), str(work / f"{name}-out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    print(f"peak memory: {count} images {peaks[0]:.0f} MiB, {count * MANY} images {peaks[1]:.0f} MiB", end="")
    print(f"   ratio {peaks[1] / peaks[0]:.3f}")


def main() -> None:
    """Print speed, then memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=["speed", "memory"])
    options = parser.parse_args()
    if options.only != "memory":
        speed(options.images, pick_device(options.device))
    if options.only != "speed":
        memory(options.images)


if __name__ == "__main__":
    main()
