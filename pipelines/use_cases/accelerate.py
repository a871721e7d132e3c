"""Twins of a version made, measured beside it, and named by its tags where they pass their gates."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import mlflow
import numpy as np

from models.engines.openvino.network import supports
from models.errors import DataError, RegistryError, one_line
from models.images.rendering import Rendering
from models.loading import load_model
from models.runtime.devices import TwinPrecision
from models.saved.folder import folder_digest
from models.saved.spec import read_spec
from models.twins import check_twin, make_twin
from pipelines.data.dataset import Dataset
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.categories import category_of
from pipelines.evaluation.side_by_side import Measurement, measure, slowdown
from pipelines.registry.gates import Check, GateFile, TwinGate, find_gates, judge_twin
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.registry.registration import log_and_register
from pipelines.registry.training_images import images_of
from pipelines.registry.twins import PRECISIONS, Twin, forget_twin, name_twin
from pipelines.registry.verification import read_example
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.display import SILENT, Display
from pipelines.use_cases.promote import open_gate_data, registered, show_checks
from pipelines.use_cases.requests import AccelerateRequest

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class Accelerated:
    """The twins that passed, the fastest first, and every gate's verdict by precision."""

    twins: list[Twin] = field(default_factory=list)
    checks: dict[TwinPrecision, list[Check]] = field(default_factory=dict)


def accelerate(registry: Registry, request: AccelerateRequest, display: Display = SILENT) -> Accelerated:
    """Convert, measure original and twins side by side on the gates' data, log a run, name what passes.

    Raises:
        PlanesError: model, data, gates or store that cannot be used; a network that cannot be converted.
    """
    version = registered(registry, request.model)
    precisions = _precisions(version, request)
    parent, example = registry.fetch(version), read_example(registry, version)
    if example is None:
        raise RegistryError(f"{version.label}: has no example (registered before 0.6); train or copy it anew")
    file, source = find_gates(str(version.name), request.gates)
    category = category_of(parent, version.label)
    datasets = open_gate_data(request.model, request.data, request.split, file, category=category)
    calibration = _calibration(request, category, datasets) if "int8" in precisions else None
    tags = {"task": "accelerate", "version": version.label}
    with (
        tempfile.TemporaryDirectory() as work,
        mlflow_runs.tracked_run(registry.client, f"accelerate {version.label}", tags) as run,
    ):
        mlflow_runs.log_params({"version": version.label, "precisions": " ".join(precisions), "gates": source})
        mlflow.log_dict(file.model_dump(), "gates.yaml")
        if calibration is not None:
            mlflow_runs.log_dataset(calibration, "calibration")
        examples = partial(calibration_examples, calibration, read_spec(parent).rendering)
        folders: dict[TwinPrecision, Path] = {}
        for precision in precisions:
            log.info(f"converting {version.label} to OpenVINO {precision}")
            folders[precision] = make_twin(
                parent, Path(work) / precision, precision, calibration=examples, exact=folders.get("f32")
            )
            check_twin(parent, folders[precision])
        measured = [_measure(version, parent, folders, dataset, display) for dataset in datasets]
        result = Accelerated()
        for precision, folder in folders.items():
            checks = _judge(file, precision, version, measured)
            result.checks[precision] = checks
            table = show_checks(checks)
            log.info(f"twin {precision} of {version.label}, gates of {source}:\n{table}")
            mlflow.log_text(table + "\n", f"checks_{precision}.txt")
            if not all(check.passed for check in checks):
                forget_twin(registry, version, precision)
                log.info(f"twin {precision}: not approved")
                continue
            _, model_id = log_and_register(
                registry,
                folder,
                f"{version.name}-{precision}",
                example=example.decoded(),
                tags={},
                run_id=run.info.run_id,
                register=False,
            )
            speedup = _speedup(precision, version, measured)
            twin = Twin(
                precision=precision,
                model_id=model_id,
                digest=folder_digest(folder),
                speedup=speedup,
                run_id=run.info.run_id,
            )
            name_twin(registry, version, twin)
            result.twins.append(twin)
            log.info(f"twin {precision}: approved, {speedup:.2f} times as fast as {version.label}")
        mlflow.set_tag("approved", " ".join(twin.precision for twin in result.twins) or "none")
        log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, run.info.run_id)}")
    return result


def _precisions(version: Resolved, request: AccelerateRequest) -> list[TwinPrecision]:
    """Those that can be made here; says which are left out, and why."""
    wanted = request.precisions or PRECISIONS
    missing = "--calibration names no data set" if request.calibration is None else None
    if missing is None and find_spec("nncf") is None:
        missing = "NNCF is not installed (pip install nncf)"
    if missing and request.precisions and "int8" in wanted:
        raise RegistryError(f"{version.label}: int8: {missing}")
    precisions: list[TwinPrecision] = []
    for precision in wanted:
        why = missing if precision == "int8" else None
        why = why if supports(precision) else "this CPU does not compute in it"
        if why:
            log.info(f"{precision}: left out, {why}")
        else:
            precisions.append(precision)
    if not precisions:
        raise RegistryError(f"{version.label}: this CPU computes in none of {', '.join(wanted)}")
    return precisions


def _calibration(request: AccelerateRequest, category: str, measured_on: Sequence[Dataset]) -> Dataset:
    """The images that int8 takes its ranges from.

    Raises:
        DataError: no such data.
        RegistryError: they are measured on too.
    """
    dataset = open_dataset(str(request.calibration), "train", category=category, keep=True)
    known = images_of(dataset)
    for other in measured_on:
        if shared := known.shared_with(other):
            raise RegistryError(
                f"{request.calibration}: {len(shared)} of its images are measured on too (first: {shared[0]}); "
                "calibrate on others"
            )
    return dataset


def calibration_examples(dataset: Dataset | None, rendering: Rendering) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`CALIBRATION_IMAGES` images with their boxes, spread over the data set; those that cannot be read are left out."""
    samples = dataset.rendered(rendering).samples if dataset is not None else ()
    for place in evenly(len(samples), CALIBRATION_IMAGES):
        sample = samples[place]
        try:
            yield sample.read(), sample.boxes
        except DataError as error:
            log.warning(f"calibration: {one_line(error)}")


def evenly(count: int, most: int) -> list[int]:
    """Up to ``most`` of ``count`` places, from the first to the last, at equal distances.

    >>> evenly(5, 9), evenly(7, 3), evenly(0, 3)
    ([0, 1, 2, 3, 4], [0, 3, 6], [])
    """
    return [int(place) for place in np.linspace(0, count - 1, min(count, most)).round()]


def _measure(
    version: Resolved, parent: Path, folders: dict[TwinPrecision, Path], dataset: Dataset, display: Display
) -> dict[str, Measurement]:
    """The parent, by its label, and its twins, by their precision, on one data set; logged."""
    mlflow_runs.log_dataset(dataset, "acceleration")
    predictors = {version.label: load_model(parent, "cpu")}
    predictors |= {precision: load_model(folder, "cpu") for precision, folder in folders.items()}
    rendering = read_spec(parent).rendering
    measured = measure(predictors, dataset, display.items, renderings=dict.fromkeys(predictors, rendering))
    for label, measurement in measured.items():
        role = "parent" if label == version.label else label
        mlflow_runs.log_evaluation(f"{role}/{dataset.name}/", measurement.evaluation, dataset, model_id=None)
    return measured


def _judge(
    file: GateFile, precision: TwinPrecision, version: Resolved, measured: Sequence[dict[str, Measurement]]
) -> list[Check]:
    gate = file.accelerate.get(precision, TwinGate())
    return [check for m in measured for check in judge_twin(gate, precision, m[precision], m[version.label])]


def _speedup(precision: TwinPrecision, version: Resolved, measured: Sequence[dict[str, Measurement]]) -> float:
    """The least over the data sets; they passed a gate that requires it to be known."""
    return min(1 / slowdown(m[precision], m[version.label]) for m in measured)
