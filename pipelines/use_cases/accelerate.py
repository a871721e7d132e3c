"""Twins of a version, or half precisions on a GPU, measured beside it and named by its tags where they pass gates."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from models.predictor import Predictor
from models.runtime.devices import HalfPrecisionKind, TwinPrecision, computes_in, gpu_name, pick_device
from models.runtime.half_precision import in_precision
from models.saved.folder import folder_digest
from models.saved.spec import read_spec
from models.twins import check_twin, make_twin
from pipelines.data.dataset import Dataset
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.categories import category_of
from pipelines.evaluation.side_by_side import Measurement, measure, slowdown
from pipelines.registry.approvals import Approved
from pipelines.registry.gates import Check, GateFile, TwinGate, find_gates, judge_twin
from pipelines.registry.gpu_precisions import KINDS, GpuPrecision, forget_gpu_precision, name_gpu_precision
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
    """What was approved.

    Attributes:
        twins: those that passed.
        gpu_precisions: half precisions that passed on a GPU.
        checks: every gate's verdict by precision.
    """

    twins: list[Twin] = field(default_factory=list)
    gpu_precisions: list[GpuPrecision] = field(default_factory=list)
    checks: dict[TwinPrecision | HalfPrecisionKind, list[Check]] = field(default_factory=dict)

    @property
    def all_approved(self) -> bool:
        """Whether everything that was tried passed its gates."""
        return len(self.twins) + len(self.gpu_precisions) == len(self.checks)


def accelerate(registry: Registry, request: AccelerateRequest, display: Display = SILENT) -> Accelerated:
    """Measure original and faster forms side by side on the gates' data, log a run, name what passes.

    On the CPU these are twins, which are converted first; on a GPU the version itself in half precision.

    Raises:
        PlanesError: model, data, gates, device or store that cannot be used; a network that cannot be converted.
    """
    version, device = registered(registry, request.model), pick_device(request.device)
    if device == "cpu":
        return _make_twins(registry, request, version, display)
    return _try_half_precisions(registry, request, version, device, display)


def _make_twins(registry: Registry, request: AccelerateRequest, version: Resolved, display: Display) -> Accelerated:
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
        predictors: dict[str, Predictor] = {version.label: load_model(parent, "cpu")}
        predictors |= {precision: load_model(folder, "cpu") for precision, folder in folders.items()}
        measured = [_measure(version, parent, predictors, dataset, display) for dataset in datasets]
        result = Accelerated()
        for precision, folder in folders.items():
            result.checks[precision] = _judge(file, source, precision, version=version, measured=measured)
            if not all(check.passed for check in result.checks[precision]):
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
        _report(registry, run.info.run_id, result.twins)
    return result


def _try_half_precisions(
    registry: Registry, request: AccelerateRequest, version: Resolved, device: str, display: Display
) -> Accelerated:
    kinds = _half_precisions(version, request, device)
    parent = registry.fetch(version)
    file, source = find_gates(str(version.name), request.gates)
    category = category_of(parent, version.label)
    datasets = open_gate_data(request.model, request.data, request.split, file, category=category)
    gpu = gpu_name(device)
    tags = {"task": "accelerate", "version": version.label}
    with mlflow_runs.tracked_run(registry.client, f"accelerate {version.label} on {gpu}", tags) as run:
        params = {"version": version.label, "precisions": " ".join(kinds), "gates": source, "device": f"{device} ({gpu})"}
        mlflow_runs.log_params(params)
        mlflow.log_dict(file.model_dump(), "gates.yaml")
        model = load_model(parent, device)
        predictors: dict[str, Predictor] = {version.label: model}
        predictors |= {kind: in_precision(model, device, kind) for kind in kinds}
        measured = [_measure(version, parent, predictors, dataset, display) for dataset in datasets]
        result = Accelerated()
        for kind in kinds:
            result.checks[kind] = _judge(file, source, kind, version=version, measured=measured)
            if not all(check.passed for check in result.checks[kind]):
                forget_gpu_precision(registry, version, kind)
                log.info(f"{kind} on {gpu}: not approved")
                continue
            speedup = _speedup(kind, version, measured)
            one = GpuPrecision(precision=kind, gpu=gpu, speedup=speedup, run_id=run.info.run_id)
            name_gpu_precision(registry, version, one)
            result.gpu_precisions.append(one)
            log.info(f"{kind} on {gpu}: approved, {speedup:.2f} times as fast as {version.label} in full precision")
        _report(registry, run.info.run_id, result.gpu_precisions)
    return result


def _report(registry: Registry, run_id: str, approved: Sequence[Approved]) -> None:
    """Note in the run what was approved, and say where the run is."""
    mlflow.set_tag("approved", " ".join(one.precision for one in approved) or "none")
    log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, run_id)}")


def _half_precisions(version: Resolved, request: AccelerateRequest, device: str) -> list[HalfPrecisionKind]:
    """Those that a GPU computes in; says which are left out."""
    if request.calibration is not None:
        raise RegistryError(f"{version.label}: --calibration is for int8 twins, which are for CPUs; leave out --device")
    twins = [precision for precision in request.precisions or () if precision not in KINDS]
    if twins:
        raise RegistryError(f"{version.label}: {twins[0]}: is a twin's, which is for CPUs; leave out --device {device}")
    kinds: list[HalfPrecisionKind] = []
    for kind in KINDS:
        if request.precisions is not None and kind not in request.precisions:
            continue
        if computes_in(device, kind):
            kinds.append(kind)
        else:
            log.info(f"{kind}: left out, this GPU does not compute in it")
    if not kinds:
        raise RegistryError(f"{version.label}: this GPU computes in none of {', '.join(request.precisions or KINDS)}")
    return kinds


def _precisions(version: Resolved, request: AccelerateRequest) -> list[TwinPrecision]:
    """Those that can be made here; says which are left out, and why."""
    halves = [precision for precision in request.precisions or () if precision in KINDS]
    if halves:
        raise RegistryError(f"{version.label}: {halves[0]}: is for GPUs (--device cuda); a twin has f32, bf16 or int8")
    wanted = [p for p in PRECISIONS if request.precisions is None or p in request.precisions]
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
    version: Resolved, parent: Path, predictors: Mapping[str, Predictor], dataset: Dataset, display: Display
) -> dict[str, Measurement]:
    """The parent, by its label, and its faster forms, by their precision, on one data set; logged."""
    mlflow_runs.log_dataset(dataset, "acceleration")
    rendering = read_spec(parent).rendering
    measured = measure(predictors, dataset, display.items, renderings=dict.fromkeys(predictors, rendering))
    for label, measurement in measured.items():
        role = "parent" if label == version.label else label
        mlflow_runs.log_evaluation(f"{role}/{dataset.name}/", measurement.evaluation, dataset, model_id=None)
    return measured


def _judge(
    file: GateFile,
    source: str,
    precision: TwinPrecision | HalfPrecisionKind,
    *,
    version: Resolved,
    measured: Sequence[dict[str, Measurement]],
) -> list[Check]:
    """The verdicts on one precision, shown and logged."""
    gate = file.accelerate.get(precision, TwinGate())
    checks = [check for m in measured for check in judge_twin(gate, precision, m[precision], m[version.label])]
    table = show_checks(checks)
    what = precision if precision in KINDS else f"twin {precision}"
    log.info(f"{what} of {version.label}, gates of {source}:\n{table}")
    mlflow.log_text(table + "\n", f"checks_{precision}.txt")
    return checks


def _speedup(
    precision: TwinPrecision | HalfPrecisionKind, version: Resolved, measured: Sequence[dict[str, Measurement]]
) -> float:
    """The least over the data sets; they passed a gate that requires it to be known."""
    return min(1 / slowdown(m[precision], m[version.label]) for m in measured)
