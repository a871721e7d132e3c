"""From 100 boxes to pasted masks, against the bare batched forwards and against one crop at a time, alternating."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from models.engines.composed import ComposedArchitecture, ComposedPredictor
from models.engines.unet.crops import normalise
from models.engines.unet.predictor import TorchSegmenter, build_segmenter
from models.engines.unet.settings import SegmenterArchitecture
from models.geometry.rle import rle_iou
from models.instances import RLE, Instances
from models.runtime.devices import pick_device

BOXES, SIZE, ROUNDS = 100, 2000, 5


class _Known:
    """A detector that costs nothing: it knows the boxes."""

    def __init__(self, detections: Instances) -> None:
        self.detections = detections

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        return [self.detections for _ in images]


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """(seconds, result) of one call, the device's work included."""
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    device = pick_device(parser.parse_args().device)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    corners = rng.uniform(0, SIZE - 130, (BOXES, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(30, 120, (BOXES, 2))], axis=1)
    detections = Instances.make("0", SIZE, SIZE, boxes, np.linspace(1, 0.5, BOXES))
    torch.manual_seed(0)
    architecture = SegmenterArchitecture(network="unet", encoder="resnet18", crop_size=128)
    segmenter = TorchSegmenter(build_segmenter(architecture), architecture, device)
    whole = ComposedPredictor(_Known(detections), segmenter, ComposedArchitecture(overlaps="keep"))
    crops = rng.integers(0, 256, (BOXES, 128, 128, 3), dtype=np.uint8)

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, BOXES, segmenter.batch):
            segmenter.model(torch.from_numpy(normalise(crops[start : start + segmenter.batch])).to(segmenter.device))

    def one_by_one() -> list[RLE]:
        return [segmenter.masks_in_boxes([image], [detections.boxes[i : i + 1]])[0][0] for i in range(BOXES)]

    def ours() -> Instances:
        return whole.predict([image])[0]

    for function in (bare, ours, one_by_one):
        function()
    rounds = [(timed(ours), timed(bare), timed(one_by_one)) for _ in range(ROUNDS)]
    seconds = [statistics.median(r[i][0] for r in rounds) for i in range(3)]
    kept, single = rounds[0][0][1], rounds[0][2][1]
    assert isinstance(kept, Instances)
    assert isinstance(single, list)
    masks = list(kept.masks or ())
    same = min(rle_iou([a], [b])[0, 0] for a, b in zip(masks, single, strict=True))
    print(f"{BOXES} boxes in {SIZE} x {SIZE} pixels, {ROUNDS} rounds, {device}, {torch.get_num_threads()} threads")
    print(f"boxes to pasted masks      {seconds[0]:.3f} s")
    print(
        f"bare batched forwards      {seconds[1]:.3f} s   ratio {statistics.median(r[0][0] / r[1][0] for r in rounds):.3f}"
    )
    print(
        f"one crop at a time         {seconds[2]:.3f} s   ratio {statistics.median(r[2][0] / r[0][0] for r in rounds):.2f}"
    )
    print(f"least IoU of a mask with that of its single crop: {same:.6f}")


if __name__ == "__main__":
    main()
