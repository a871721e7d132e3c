"""What a GPU gains: our predictors, in full and half precision, against the same networks as torchvision and smp run them.

All ways take turns on the same images; a ratio is the seconds of the library's way over those of ours. On a CPU it runs
too, and shows nothing but that it does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.masks import timed
from benchmarks.speed import random_segmenter, rotated
from benchmarks.tiles import plain_network, random_model
from models.engines.unet.crops import CropSegmenter, normalise
from models.engines.unet.predictor import build_segmenter
from models.engines.unet.settings import SegmenterArchitecture
from models.loading import load_model
from models.predictor import Predictor
from models.runtime.devices import Precision, computes_in, gpu_name, pick_device, precision
from models.saved.checkpoints import load_strict
from models.saved.folder import read_weights
from models.saved.spec import parse_architecture, read_spec
from pipelines.data.synthetic.scenes import AirfieldSettings, draw_scene

SIDE = 640
HALVES: tuple[Precision, ...] = ("bf16-mixed", "16-mixed")
Way = Callable[[], object]


@torch.inference_mode()
def library_detects(network: nn.Module, images: Sequence[np.ndarray], device: str) -> None:
    """One call of torchvision's network, its results brought to the CPU."""
    tensors = [torch.from_numpy(image).to(device).permute(2, 0, 1).float().div(255) for image in images]
    for output in network(tensors):
        for values in output.values():
            values.cpu()


@torch.inference_mode()
def library_segments(network: nn.Module, crops: np.ndarray, device: str) -> None:
    """One call of smp's network on crops of its size."""
    torch.sigmoid(network(torch.from_numpy(normalise(crops)).to(device))).cpu()


def in_precisions(ours: Callable[[], object], device: str) -> dict[str, Way]:
    """Our way in each precision that the device computes in."""

    def way(kind: Precision) -> object:
        with precision(device, kind):
            return ours()

    kinds = [kind for kind in HALVES if device != "cpu" and computes_in(device, kind)]
    return {f"ours {kind}": partial(way, kind) for kind in ("32", *kinds)}


def show(title: str, ways: dict[str, Way], rounds: int, images: int, device: str) -> None:
    """Print seconds, images a second, and ratios to the first way."""

    def waited(way: Way) -> None:
        way()
        if device != "cpu":
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(4):
        for way in ways.values():
            waited(way)
    for number in range(rounds):
        for name in rotated(list(ways), number):
            seconds[name].append(timed(partial(waited, ways[name]))[0])
    print(title)
    first = next(iter(ways))
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], values, strict=True)]
        middle = statistics.median(values)
        times = f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"   {name:<16} {middle:8.4f} s   {images / middle:7.0f} a second   {times}")


def detectors(work: Path, device: str, rounds: int, batches: Sequence[int]) -> None:
    """The detector of the recipe detector_scratch with random weights on tiles of a drawn scene."""
    folder = random_model(work / "detector")
    predictor: Predictor = load_model(folder, device, {"size": 0})
    network = plain_network(folder).to(device)
    scene = draw_scene(AirfieldSettings(size=SIDE * 4, planes_min=40, planes_max=60), "test", 0).image
    tiles = [scene[y : y + SIDE, x : x + SIDE] for y in range(0, SIDE * 4, SIDE) for x in range(0, SIDE * 4, SIDE)]
    for batch in batches:
        chosen = [np.ascontiguousarray(tile) for tile in (tiles * (batch // len(tiles) + 1))[:batch]]
        ways: dict[str, Way] = {"torchvision": partial(library_detects, network, chosen, device)}
        ways |= in_precisions(partial(predictor.predict, chosen), device)
        show(f"detector_scratch, {batch} tiles of {SIDE} pixels", ways, rounds, batch, device)


def segmenters(work: Path, device: str, rounds: int, batches: Sequence[int]) -> None:
    """The ResNet-18 U-Net of the recipe unet_scratch without flips, with random weights."""
    folder = random_segmenter(work / "unet")
    predictor = load_model(folder, device)
    assert isinstance(predictor, CropSegmenter)
    spec = read_spec(folder)
    network = build_segmenter(parse_architecture(spec, SegmenterArchitecture)).eval()
    load_strict(network, read_weights(folder), str(folder))
    network.to(device)
    side = predictor.settings.crop_size
    for batch in batches:
        crops = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3)).astype(np.uint8)
        ways: dict[str, Way] = {"smp": partial(library_segments, network, crops, device)}
        ways |= in_precisions(partial(predictor.segment, list(crops)), device)
        show(f"U-Net ResNet-18, {batch} crops of {side} pixels", ways, rounds, batch, device)


def main() -> None:
    """Print a table for each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", default="1,4,8,16,32", help="tiles at a time")
    parser.add_argument("--crops", default="1,20,128", help="crops at a time")
    options = parser.parse_args()
    device = pick_device(options.device)
    print(
        f"{'the CPU' if device == 'cpu' else gpu_name(device)}, torch {torch.__version__}, {options.rounds} rounds in turn"
    )
    with tempfile.TemporaryDirectory() as work:
        detectors(Path(work), device, options.rounds, [int(b) for b in options.batches.split(",")])
        segmenters(Path(work), device, options.rounds, [int(b) for b in options.crops.split(",")])


if __name__ == "__main__":
    main()
