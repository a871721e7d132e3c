"""What twins and half precision cost: metrics of a version and its twins over data sets, and where detections differ."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from tabulate import tabulate

from models.engines.openvino.network import supports
from models.loading import load_model
from models.predictor import Predictor
from models.runtime.half_precision import in_precision
from models.saved.spec import read_spec
from models.twins import make_twin
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.side_by_side import Measurement, measure
from pipelines.registry.gates import largest_differences
from pipelines.registry.twins import PRECISIONS
from pipelines.steps.cli_support import show_progress
from pipelines.use_cases.accelerate import calibration_examples

METRICS = ("AP", "AP50", "mask_AP", "mask_AP50", "IoU")


def differences(ours: Measurement, theirs: Measurement) -> str:
    """Images with another number of detections, and the largest differences of boxes and scores over all others."""
    compared, images = largest_differences(ours, theirs), len(theirs.predictions)
    other = f"{compared.unequal} of {images} images have another number" if compared.unequal else ""
    if compared.unequal == images:
        return other
    return f"{other}{'; ' if other else ''}{compared}"


def main() -> None:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="saved folder of a version")
    parser.add_argument("data", nargs="+", help="data sets with truth, each with its split: FOLDER:test")
    parser.add_argument("--calibration", default=None, help="data set whose training split calibrates int8")
    parser.add_argument("--images", type=int, default=None, help="so many images of each")
    options = parser.parse_args()
    folder = Path(options.model)
    rendering = read_spec(folder).rendering
    with tempfile.TemporaryDirectory() as work:
        predictors: dict[str, Predictor] = {"PyTorch float32": load_model(folder, "cpu")}
        if read_spec(folder).kind != "segmenter":
            predictors["PyTorch bfloat16"] = in_precision(predictors["PyTorch float32"], "cpu", "bf16-mixed")
        kinds = [p for p in PRECISIONS if supports(p) and (p != "int8" or options.calibration)]
        for kind in kinds:
            # Opened on use: only int8 needs it.
            twin = make_twin(
                folder,
                Path(work) / kind,
                kind,
                calibration=lambda: calibration_examples(open_dataset(options.calibration, "train", keep=True), rendering),
            )
            predictors[f"twin {kind}"] = load_model(twin, "cpu")
        for text in options.data:
            path, _, split = text.rpartition(":")
            dataset = open_dataset(path, split, keep=True)
            if options.images:
                dataset = dataset.subset([s.image_id for s in dataset.samples[: options.images]], split)
            measured = measure(predictors, dataset, show_progress, renderings=dict.fromkeys(predictors, rendering))
            parent = measured["PyTorch float32"]
            shown = [m for m in METRICS if math.isfinite(parent.metrics.get(m, math.nan))]
            rows = []
            for name, of in measured.items():
                values = [f"{of.metrics[m]:.4f} ({of.metrics[m] - parent.metrics[m]:+.4f})" for m in shown]
                rows.append([name, *values, "" if of is parent or parent.segmenter else differences(of, parent)])
            print(f"{dataset.name}/{split}: {len(dataset)} images, {dataset.planes} planes")
            print(tabulate(rows, headers=["", *shown, "detections"], disable_numparse=True))


if __name__ == "__main__":
    main()
