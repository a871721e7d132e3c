"""Twins of a version made, measured beside it, and named by its tags where they pass their gates."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlflow

from models.engines.openvino.network import supports
from models.engines.openvino.settings import TwinPrecision
from models.errors import RegistryError
from models.loading import load_model
from models.saved.folder import folder_digest
from models.saved.spec import read_spec
from models.twins import check_twin, make_twin
from pipelines.data.dataset import Dataset
from pipelines.evaluation.categories import category_of
from pipelines.evaluation.side_by_side import Measurement, measure, slowdown
from pipelines.registry.gates import Check, GateFile, TwinGate, find_gates, judge_twin
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.registry.registration import log_and_register
from pipelines.registry.twins import PRECISIONS, Twin, forget_twin, name_twin
from pipelines.registry.verification import read_example
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.display import SILENT, Display
from pipelines.use_cases.promote import open_gate_data, registered, show_checks

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AccelerateRequest:
    """Of what to make twins, in which precisions, and what to measure them on.

    ``gates``, ``data`` and ``split`` as of a promotion. A precision that this CPU lacks is left out.
    """

    model: str
    precisions: tuple[TwinPrecision, ...] = PRECISIONS
    gates: str | None = None
    data: tuple[str, ...] = ()
    split: str | None = None


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
    precisions = [p for p in request.precisions if supports(p)]
    for left in (p for p in request.precisions if p not in precisions):
        log.info(f"{left}: left out, this CPU does not compute in it")
    if not precisions:
        raise RegistryError(f"{version.label}: this CPU computes in none of {', '.join(request.precisions)}")
    parent, example = registry.fetch(version), read_example(registry, version)
    if example is None:
        raise RegistryError(f"{version.label}: has no example (registered before 0.6); train or copy it anew")
    file, source = find_gates(str(version.name), request.gates)
    category = category_of(parent, version.label)
    datasets = open_gate_data(request.model, request.data, request.split, file, category)
    tags = {"task": "accelerate", "version": version.label}
    with (
        tempfile.TemporaryDirectory() as work,
        mlflow_runs.tracked_run(registry.client, f"accelerate {version.label}", tags) as run,
    ):
        mlflow_runs.log_params({"version": version.label, "precisions": " ".join(precisions), "gates": source})
        mlflow.log_dict(file.model_dump(), "gates.yaml")
        folders: dict[TwinPrecision, Path] = {}
        for precision in precisions:
            log.info(f"converting {version.label} to OpenVINO {precision}")
            folders[precision] = make_twin(parent, Path(work) / precision, precision)
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
                registry, folder, f"{version.name}-{precision}", example.decoded(), {}, run.info.run_id, register=False
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
        mlflow_runs.log_evaluation(f"{role}/{dataset.name}/", measurement.evaluation, dataset, None)
    return measured


def _judge(
    file: GateFile, precision: TwinPrecision, version: Resolved, measured: Sequence[dict[str, Measurement]]
) -> list[Check]:
    gate = file.accelerate.get(precision, TwinGate())
    return [check for m in measured for check in judge_twin(gate, precision, m[precision], m[version.label])]


def _speedup(precision: TwinPrecision, version: Resolved, measured: Sequence[dict[str, Measurement]]) -> float:
    """The least over the data sets; they passed a gate that requires it to be known."""
    return min(1 / slowdown(m[precision], m[version.label]) for m in measured)
