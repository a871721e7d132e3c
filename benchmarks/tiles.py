"""Prediction by tiles, ours against SAHI's with the same weights, tiles and image, and against the bare forward passes."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sahi.models.torchvision import TorchVisionDetectionModel
from sahi.predict import get_sliced_prediction

from benchmarks.masks import timed
from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.engines.torchvision.predictor import TorchvisionDetector, detector_spec
from models.instances import Instances
from models.loading import load_model
from models.runtime.devices import pick_device
from models.saved.checkpoints import load_strict
from models.saved.folder import read_weights, save_model
from models.saved.spec import parse_architecture, read_spec
from models.tiling.predictor import Tiled
from models.tiling.settings import Tiling, tile_grid
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.synthetic.scenes import AirfieldSettings, draw_scene
from pipelines.evaluation.metrics import evaluate_instances
from pipelines.recipes.reading import load_recipe
from pipelines.recipes.settings import DetectorRecipe

THRESHOLD = 0.05


def random_model(folder: Path, tiled: bool = False) -> Path:
    """A saved detector of the recipe detector_scratch with random weights, which finds something everywhere."""
    torch.manual_seed(0)
    recipe = load_recipe("detector_scratch")
    assert isinstance(recipe, DetectorRecipe)
    network = build_detector(recipe.architecture, 1)
    # SAHI cuts at one scale.
    tiling = recipe.tiling.model_copy(update={"zooms": (1.0,)}) if tiled and recipe.tiling else None
    return save_model(folder, detector_spec(recipe.architecture, ["plane"], tiling=tiling), network.state_dict())


def plain_network(folder: Path) -> torch.nn.Module:
    """torchvision's network of a saved folder, in torch's usual memory layout, filtering image by image as it does."""
    spec = read_spec(folder)
    model = build_detector(parse_architecture(spec, DetectorArchitecture), len(spec.classes))
    load_strict(model, read_weights(folder), str(folder))
    model.rpn.devices = model.roi_heads.devices = ()
    return model.eval()


def agreement(predictions: Instances, other: Instances, image: np.ndarray) -> float:
    """COCO's AP of one result with the other as truth."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        Image.fromarray(image).save(path)
        height, width = image.shape[:2]
        none = (None,) * len(other)
        sample = Sample(
            "0",
            path,
            height=height,
            width=width,
            scene="0",
            boxes=other.boxes,
            masks=none,
            crowd=np.zeros(len(other), bool),
        )
        dataset = Dataset("image", path, "test", "plane", (sample,))
        return evaluate_instances(dataset, [predictions], score_threshold=0, max_dets=(1, 10, 100_000)).metrics["AP"]


def unmerged(tiled: Tiled, image: np.ndarray) -> Instances:
    """The detections of all tiles, in the image's pixels."""
    tile_results = tiled.predict_tiles([image])[0]
    boxes = np.concatenate([r.instances.boxes + np.array(r.window[:2] * 2, np.float32) for r in tile_results])
    scores = np.concatenate([r.instances.scores for r in tile_results])
    return Instances.make("0", image.shape[0], image.shape[1], boxes, scores).above(THRESHOLD)


def sliced(model: TorchVisionDetectionModel, image: np.ndarray, tiling: Tiling, batch: int, merge: bool) -> Instances:
    """SAHI's prediction; without ``merge`` nothing is taken away."""
    result = get_sliced_prediction(
        image,
        model,
        slice_height=tiling.size,
        slice_width=tiling.size,
        overlap_height_ratio=tiling.overlap,
        overlap_width_ratio=tiling.overlap,
        perform_standard_pred=False,
        postprocess_type="GREEDYNMM" if merge else "NMS",
        postprocess_match_metric="IOS" if merge else "IOU",
        postprocess_match_threshold=0.5 if merge else 2.0,
        force_postprocess_type=True,
        verbose=0,
        batch_size=batch,
    )
    boxes = [p.bbox.to_xyxy() for p in result.object_prediction_list]
    scores = [p.score.value for p in result.object_prediction_list]
    return Instances.make("0", image.shape[0], image.shape[1], boxes, scores)


def main() -> None:
    """Print seconds, ratios and agreement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="a saved torchvision detector; random weights without it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,4", help="batch sizes for SAHI; the best counts")
    options = parser.parse_args()
    device = pick_device(options.device)
    tiling = Tiling(size=options.tile, overlap=0.25)
    # Both cut the same tiles out of this side.
    side = tiling.size + 3 * (tiling.size - tiling.shared)
    image = draw_scene(AirfieldSettings(size=side, planes_min=40, planes_max=60), "test", 0).image
    folder = Path(options.model) if options.model else random_model(Path(tempfile.mkdtemp()) / "model")
    detector = load_model(folder, device, {"size": 0})
    assert isinstance(detector, TorchvisionDetector)
    tiled = Tiled(detector, tiling, device)
    theirs = TorchVisionDetectionModel(
        model=plain_network(folder),
        confidence_threshold=THRESHOLD,
        device=device,
        category_mapping={"0": "none", "1": "plane"},
    )
    tiles = [image[y1:y2, x1:x2] for x1, y1, x2, y2 in tile_grid(side, side, tiling)]

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, len(tiles), tiled.batch):
            detector.model([detector.tensors([t])[0] for t in tiles[start : start + tiled.batch]])

    batches = [int(b) for b in options.batches.split(",")]
    ways: dict[str, Callable[[], object]] = {"ours": lambda: tiled.predict([image])[0], "bare": bare}
    ways |= {f"SAHI {b}": partial(sliced, theirs, image, tiling, batch=b, merge=True) for b in batches}
    for way in ways.values():
        way()
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(options.rounds)]
    seconds = {name: statistics.median(r[name][0] for r in rounds) for name in ways}
    best = min((n for n in ways if n.startswith("SAHI")), key=lambda n: seconds[n])
    print(
        f"{len(tiles)} tiles of {tiling.size} pixels, {options.rounds} rounds in turn, medians, {device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"ours                  {seconds['ours']:.2f} s")
    for name in ways:
        if name != "ours":
            ratio = statistics.median(r["ours"][0] / r[name][0] for r in rounds)
            what = "bare forward passes" if name == "bare" else f"SAHI, batches of {name[5:]}"
            print(f"{what:<21} {seconds[name]:.2f} s   ratio {ratio:.3f}{'   (its best)' if name == best else ''}")
    mine, other = unmerged(tiled, image), sliced(theirs, image, tiling, batch=1, merge=False)
    same = agreement(mine, other, image)
    print(f"before merging: {len(mine)} and SAHI {len(other)} boxes, AP of one against the other {same:.4f}")
    merged, others = (rounds[0][n][1] for n in ("ours", best))
    assert isinstance(merged, Instances)
    assert isinstance(others, Instances)
    print(f"after merging: {len(merged.above(THRESHOLD))} and SAHI {len(others)} boxes")


if __name__ == "__main__":
    main()
