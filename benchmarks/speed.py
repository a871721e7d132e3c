"""Twins against PyTorch, ONNX Runtime and SAHI: networks alone, and whole jobs from image files to tables.

All ways take turns on the same images, so that a machine that slows down slows all of them; a ratio is PyTorch's
seconds in float32 over those of a way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.masks import timed
from benchmarks.tiles import THRESHOLD, plain_network, random_model, sliced
from models.engines.composed import ComposedArchitecture, save_composed
from models.engines.openvino.conversion import parts_of
from models.engines.openvino.network import supports
from models.engines.torchvision.network import DetectorArchitecture, MaskArchitecture, build_detector
from models.engines.torchvision.predictor import detector_spec
from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.images.decoding import read_image
from models.loading import load_model
from models.predictor import Predictor
from models.runtime.devices import Precision, TwinPrecision, precision
from models.saved.folder import save_model
from models.saved.spec import read_spec
from models.tiling.predictor import tiling_of
from models.twins import make_twin
from pipelines.data.dataset import Dataset
from pipelines.data.readers.opening import open_dataset
from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield
from pipelines.registry.twins import PRECISIONS
from pipelines.use_cases.accelerate import evenly
from scoring.jobs.job import run_job
from scoring.requests import JobSettings

CHUNKS = 4
CALIBRATION = 2
# Side of the square input on which a network alone is measured.
SIDES = {"detector_scratch": 640, "faster_rcnn": 800, "mask_rcnn": 800}
UNET_CROPS = 12
Twins = Mapping[str, Mapping[TwinPrecision, Path]]
TORCH, HALF = "PyTorch float32", "PyTorch bfloat16"


def random_detector(folder: Path, masks: bool) -> Path:
    """torchvision's Faster or Mask R-CNN ResNet-50 FPN at 800 pixels, as it comes, with random weights."""
    torch.manual_seed(0)
    kind = MaskArchitecture if masks else DetectorArchitecture
    architecture = kind(max_detections=100)
    return save_model(folder, detector_spec(architecture, ["plane"]), build_detector(architecture, 1).state_dict())


def random_segmenter(folder: Path) -> Path:
    """The ResNet-18 U-Net of the recipe unet_scratch without flips, with random weights."""
    torch.manual_seed(0)
    architecture = SegmenterArchitecture(network="unet", encoder="resnet18", crop_size=128)
    return save_model(folder, segmenter_spec(architecture, ["plane"]), build_segmenter(architecture).state_dict())


def saved_models(work: Path, detector: str | None, segmenter: str | None) -> dict[str, Path]:
    """Saved folders by case."""
    models = {
        "detector_scratch": Path(detector) if detector else random_model(work / "detector", tiled=True),
        "faster_rcnn": random_detector(work / "faster_rcnn", masks=False),
        "mask_rcnn": random_detector(work / "mask_rcnn", masks=True),
        "unet": Path(segmenter) if segmenter else random_segmenter(work / "unet"),
    }
    parts = models["detector_scratch"], models["unet"]
    models["composed"] = save_composed(work / "composed", *parts, ComposedArchitecture(), components={})
    return models


class OnnxNetwork:
    """A network exported to ONNX for one shape of input, run by ONNX Runtime."""

    def __init__(self, folder: Path, inputs: Sequence[np.ndarray], path: Path) -> None:
        import onnxruntime

        predictor = load_model(folder, "cpu", {} if read_spec(folder).kind == "segmenter" else {"size": 0})
        module, _, _ = parts_of(predictor, read_spec(folder))
        given = tuple(torch.from_numpy(i) for i in inputs)
        names = ["pixels", "size"][: len(given)]
        with warnings.catch_warnings():
            # Tracing warns of every shape that it takes for constant.
            warnings.simplefilter("ignore")
            torch.onnx.export(module.eval(), given, str(path), dynamo=False, opset_version=17, input_names=names)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # A size that is a constant of the trace is no input any more.
        self._taken = {i.name for i in self._session.get_inputs()}
        self._names = names

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The outputs of the network."""
        return self._session.run(None, {n: v for n, v in zip(self._names, inputs, strict=True) if n in self._taken})


def network_ways(
    folder: Path, twins: Mapping[TwinPrecision, Path], case: str, work: Path
) -> dict[str, Callable[[], object]]:
    """Each way to run one network once, on the same numbers."""
    segmenter = read_spec(folder).kind == "segmenter"
    predictor = load_model(folder, "cpu", {} if segmenter else {"size": 0})
    module, _, _ = parts_of(predictor, read_spec(folder))
    module.eval()
    rng = np.random.default_rng(0)
    if segmenter:
        side = predictor.settings.crop_size  # type: ignore[attr-defined]
        inputs = [rng.normal(size=(UNET_CROPS, 3, side, side)).astype(np.float32)]
    else:
        side = SIDES[case]
        inputs = [rng.normal(size=(1, 3, side, side)).astype(np.float32), np.array([side, side])]
    tensors = [torch.from_numpy(i) for i in inputs]

    def torch_way(kind: Precision) -> object:
        with torch.inference_mode(), precision("cpu", kind):
            return module(*tensors)

    ways: dict[str, Callable[[], object]] = {TORCH: partial(torch_way, "32"), HALF: partial(torch_way, "bf16-mixed")}
    for kind, twin in twins.items():
        # By tiles of that side, for whose shape a twin is compiled.
        loaded: Any = load_model(twin, "cpu", {} if segmenter else {"size": SIDES[case]})
        ways[f"twin {kind}"] = partial(getattr(loaded, "predictor", loaded).network, *inputs)
    try:
        exported = OnnxNetwork(folder, inputs, work / f"{case}.onnx")
        if not _same(exported(*inputs), torch_way("32")):
            raise ValueError("what it gives is not what PyTorch gives")
        ways["ONNX Runtime"] = partial(exported, *inputs)
    except Exception as error:
        print(f"   ONNX Runtime: cannot take it ({str(error).splitlines()[0][:100]})")
    return ways


def _same(ours: Sequence[np.ndarray], theirs: Any) -> bool:
    """Whether an exported network gives what PyTorch gives: a trace may hold constants of another input."""
    others = [t.numpy() for t in (theirs if isinstance(theirs, tuple) else (theirs,))]
    return len(ours) == len(others) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-2) for a, b in zip(ours, others, strict=True)
    )


def peak_flops() -> float:
    """Operations a second of a large product of bfloat16 matrices: the most that this machine was seen to do."""
    matrix = torch.rand(4096, 4096, dtype=torch.bfloat16)
    return 2 * 4096**3 / min(timed(lambda: matrix @ matrix)[0] for _ in range(5))


def networks_alone(models: Mapping[str, Path], twins: Twins, rounds: int, work: Path) -> None:
    """Print seconds, ratios and shares of the peak of each network."""
    peak = peak_flops()
    print(f"networks alone, medians of {rounds} rounds in turn; peak of a bfloat16 product {peak / 1e12:.2f} TFLOP/s")
    for case, folder in models.items():
        if case == "composed":
            continue
        ways = network_ways(folder, twins[case], case, work)
        with FlopCounterMode(display=False) as counter:
            ways[TORCH]()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()
        for number in range(rounds):
            for name in rotated(list(ways), number):
                seconds[name].append(timed(ways[name])[0])
        what = f"{UNET_CROPS} crops" if case == "unet" else f"{SIDES[case]} pixels"
        print(f"{case}, {what}, {counter.get_total_flops() / 1e9:.0f} GFLOP")
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds[TORCH], values, strict=True))
            share = counter.get_total_flops() / statistics.median(values) / peak
            print(f"   {name:<18} {statistics.median(values):7.3f} s   {ratio:5.2f} times   {share:4.0%} of the peak")


def rotated(names: list[str], number: int) -> list[str]:
    """The names, from another one on in each round."""
    start = number % len(names)
    return names[start:] + names[:start]


def chunks(dataset: Dataset) -> Iterator[Dataset]:
    """The data set in parts, images of a scene spread over them."""
    for first in range(CHUNKS):
        part = [s.image_id for s in dataset.samples[first::CHUNKS]]
        if part:
            yield dataset.subset(part, dataset.split)


def job(predictor: Predictor, kind: Precision, dataset: Dataset, out: Path) -> dict[str, float]:
    """Score a data set as `score` does; the seconds of its stages."""
    settings = JobSettings(overlays=0, precision=kind)
    done = run_job(predictor, "m/1", dataset, out, settings=settings, progress=lambda r, *_: r, device="cpu")
    return dict(done.timings)


def sahi_way(folder: Path, dataset: Dataset, out: Path) -> None:
    """What one writes with SAHI: read, predict by tiles, keep the boxes."""
    from sahi.models.torchvision import TorchVisionDetectionModel

    tiling = read_spec(folder).tiling
    assert tiling is not None
    model = TorchVisionDetectionModel(
        model=plain_network(folder),
        confidence_threshold=THRESHOLD,
        device="cpu",
        category_mapping={"0": "none", "1": "plane"},
    )
    for sample in dataset.samples:
        sliced(model, read_image(sample.path), tiling, batch=1, merge=True)


def whole_jobs(models: Mapping[str, Path], twins: Twins, dataset: Dataset, work: Path) -> None:
    """Print seconds and ratios from image files to tables."""
    print(f"whole jobs: decode, tile, network, merge, write; {len(dataset)} images of {dataset.name} in {CHUNKS} chunks")
    for case, folder in models.items():
        if case == "unet" and not dataset.has_truth:
            continue
        loaded = {TORCH: load_model(folder, "cpu")}
        loaded |= {f"twin {kind}": load_model(twin, "cpu") for kind, twin in twins[case].items()}
        ways: dict[str, Callable[[Dataset, Path], Any]] = {n: partial(job, p, "32") for n, p in loaded.items()}
        ways[HALF] = partial(job, loaded[TORCH], "bf16-mixed")
        tiling = tiling_of(loaded[TORCH])
        if tiling is not None and case == "detector_scratch":
            ways["SAHI"] = partial(sahi_way, folder)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        stages: dict[str, dict[str, float]] = {name: {} for name in ways}
        first = dataset.subset([dataset.samples[0].image_id], dataset.split)
        for name in ways:
            ways[name](first, work / "jobs" / case / name / "warm")
        for number, part in enumerate(chunks(dataset)):
            for name in rotated(list(ways), number):
                started = time.perf_counter()
                timings = ways[name](part, work / "jobs" / case / name / str(number))
                seconds[name].append(time.perf_counter() - started)
                for stage, value in (timings or {}).items():
                    stages[name][stage] = stages[name].get(stage, 0.0) + value
        print(case)
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(seconds[TORCH], values, strict=True)]
            parts = ", ".join(f"{k} {v:.1f}" for k, v in sorted(stages[name].items(), key=lambda s: -s[1]) if v >= 0.05)
            print(
                f"   {name:<18} {sum(values):7.1f} s   {sum(seconds[TORCH]) / sum(values):5.2f} times "
                f"(chunks {min(ratios):.2f} to {max(ratios):.2f})   {parts}"
            )


def all_twins(models: Mapping[str, Path], kinds: Sequence[TwinPrecision], examples: Any, work: Path) -> Twins:
    """Twins of each model; of a composition those of its parts, composed."""
    twins: dict[str, dict[TwinPrecision, Path]] = {}
    for case, folder in models.items():
        parts = [twins[role] for role in ("detector_scratch", "unet") if role in twins]
        twins[case] = {}
        for kind in kinds:
            if case == "composed" and len(parts) == 2:
                detector, segmenter = (part[kind] for part in parts)
                twins[case][kind] = save_composed(
                    work / case / kind, detector, segmenter, ComposedArchitecture(), components={}
                )
            else:
                twins[case][kind] = make_twin(
                    folder, work / case / kind, kind, calibration=examples, exact=twins[case].get("f32")
                )
    return twins


def data_set(data: str | None, split: str, images: int | None, work: Path) -> Dataset:
    """The images to score: so many of a data set, spread over it, or drawn ones."""
    if data is None:
        prepare_airfield(work / "airfield", AirfieldSettings(train=10, test=2))
    dataset = open_dataset(data or work / "airfield", split, keep=True)
    if images is None:
        return dataset
    return dataset.subset([dataset.samples[place].image_id for place in evenly(len(dataset), images)], split)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=None, help="data set to score; drawn airfields without it")
    parser.add_argument("--split", default="train+test")
    parser.add_argument("--images", type=int, default=None, help="so many of its images")
    parser.add_argument("--detector", default=None, help="saved detector that predicts by tiles; random weights without it")
    parser.add_argument("--segmenter", default=None, help="saved U-Net; random weights without it")
    parser.add_argument("--cases", default="detector_scratch,faster_rcnn,mask_rcnn,unet,composed")
    parser.add_argument("--parts", default="networks,jobs")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        wanted = options.cases.split(",")
        models = {k: v for k, v in saved_models(work, options.detector, options.segmenter).items() if k in wanted}
        kinds = [p for p in PRECISIONS if supports(p)]
        dataset = data_set(options.data, options.split, options.images, work)
        # What is calibrated on the images of a benchmark says nothing about accuracy: see twin_accuracy.
        few = dataset.samples[:CALIBRATION]
        twins = all_twins(models, kinds, lambda: ((s.read(), s.boxes) for s in few), work / "twins")
        print(f"{torch.get_num_threads()} threads; a ratio is {TORCH}'s seconds over a way's")
        parts = options.parts.split(",")
        if "networks" in parts:
            networks_alone(models, twins, options.rounds, work)
        if "jobs" in parts:
            whole_jobs(models, twins, dataset, work)


if __name__ == "__main__":
    main()
