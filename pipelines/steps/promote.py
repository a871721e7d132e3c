"""Entry point ``promote``: move an alias to a version that passes its gate."""

from __future__ import annotations

from dataclasses import dataclass

import click
import mlflow

from models.errors import RegistryError
from models.predictor import load_model, read_spec
from models.torch_tools import pick_device
from pipelines import registry, tracking
from pipelines.data.dataset import Dataset
from pipelines.data.opening import open_dataset
from pipelines.evaluation import Evaluation
from pipelines.prediction import MAIN_METRIC, evaluate_predictions, is_segmenter, predict_image
from pipelines.promotion import Decision, Gate, compare_on_same_data, decide, move_alias, present_version
from pipelines.steps.edge import friendly, show_progress

NOT_PROMOTED = 2


@dataclass(frozen=True)
class PromotionRequest:
    """What the command was asked for; ``metric`` "auto" is the model kind's main one."""

    model: str
    alias: str
    data: str
    split: str
    metric: str
    minimum: float
    min_gain: float
    device: str


@click.command()
@click.option("--model", default="planes-det/latest", show_default=True, help="Candidate: NAME/VERSION or NAME@ALIAS.")
@click.option("--alias", default="production", show_default=True, help="Alias to move.")
@click.option("--data", default="data/airfield", show_default=True, help="Data set with ground truth.")
@click.option("--split", default="test", show_default=True, help="Split of a data folder to evaluate on.")
@click.option("--metric", default="auto", show_default=True, help="AP, AP50, IoU, Dice, ...; auto: the kind's main one.")
@click.option("--minimum", default=0.0, show_default=True, type=float, help="Least value of the metric.")
@click.option("--min-gain", default=0.0, show_default=True, type=float, help="Least gain; below 0 allows a loss.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@friendly
def main(**options) -> None:  # type: ignore[no-untyped-def]
    """Evaluate a version and the one that holds the alias on the same data; move the alias if the gate passes.

    Exit code 0: promoted or already there; 2: the gate said no.
    """
    decision = promote(PromotionRequest(**options))
    if decision is not None and not decision.passed:
        raise SystemExit(NOT_PROMOTED)


def promote(request: PromotionRequest) -> Decision | None:
    """Run the gate and move the alias; None where the candidate holds the alias already.

    Raises:
        PlanesError: model, data or metric that cannot be used.
    """
    alias = request.alias.lower()
    tracking.connect()
    candidate = registry.resolve(request.model)
    if candidate.name is None:
        raise RegistryError(f"{request.model}: a saved folder; only a registered version can be promoted")
    present = present_version(candidate.name, alias)
    if present is not None and present.version == candidate.version:
        click.echo(f"{candidate.label} is {alias} already")
        return None
    dataset = open_dataset(request.data, request.split)
    click.echo(dataset.summary())
    device = pick_device(request.device)
    kind = read_spec(registry.fetch(candidate)).kind
    metric = MAIN_METRIC.get(kind, "AP") if request.metric == "auto" else request.metric
    gate = Gate(metric, request.minimum, request.min_gain)
    with tracking.tracked_run(f"promote {candidate.label} to {alias}", {"task": "promote", "version": candidate.label}):
        tracking.log_dataset(dataset, "promotion")
        tracking.log_params({**request.__dict__, "candidate": candidate.label, "metric": metric})
        ours, theirs = compare_on_same_data(candidate, present, lambda v: _evaluate(v, dataset, device))
        tracking.log_evaluation("candidate/", ours, dataset, candidate.model_id)
        if theirs is not None and present is not None:
            tracking.log_evaluation("present/", theirs, dataset, present.model_id)
        decision = decide(gate, _value(ours, metric), None if theirs is None else _value(theirs, metric))
        mlflow.set_tags({"decision": "promoted" if decision.passed else "refused", "reason": decision.reason})
        if decision.passed:
            move_alias(candidate, present, alias, decision.reason)
    verb = f"is {alias} now" if decision.passed else f"not promoted to {alias}"
    click.echo(f"{candidate.label} {verb}: {decision.reason}")
    return decision


def _evaluate(version: registry.Resolved, dataset: Dataset, device: str) -> Evaluation:
    predictor = load_model(registry.fetch(version), device)
    samples = show_progress(dataset.samples, len(dataset), f"evaluating {version.label}")
    predictions = [predict_image(predictor, s.read(), s) for s in samples]
    evaluations = evaluate_predictions(predictions, dataset, is_segmenter(predictor))
    metrics = {prefix + k: v for prefix, e in evaluations for k, v in e.metrics.items()}
    return Evaluation(metrics, evaluations[0][1].settings)


def _value(evaluation: Evaluation, metric: str) -> float:
    if metric not in evaluation.metrics:
        raise RegistryError(f"--metric {metric}: not known here; known: {', '.join(evaluation.metrics)}")
    return evaluation.metrics[metric]


if __name__ == "__main__":
    main()
