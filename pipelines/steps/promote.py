"""Entry point ``promote``: by one metric, or by gates from a file."""

from __future__ import annotations

from typing import Any

import click

from pipelines.registry.gates import parse_gates
from pipelines.registry.model_versions import Registry
from pipelines.steps.cli_support import TERMINAL, friendly
from pipelines.steps.commands import Command
from pipelines.steps.options import option
from pipelines.steps.reporting import NOT_PASSED, end, record
from pipelines.use_cases.promote import main_metric, promote, registered
from pipelines.use_cases.requests import PromotionRequest


@click.command(
    cls=Command,
    headings={
        "What, and where to": ("model", "alias"),
        "One metric": ("metric", "minimum", "min_gain"),
        "Gates": ("gates", "data", "split", "device"),
    },
    env="PLANES_PROMOTE",
    examples=("python -m pipelines.steps.promote --model planes-det/latest --data data/airfield --minimum 0.5",),
    reports=True,
)
@option(PromotionRequest, "model", default="planes-det/latest")
@option(PromotionRequest, "alias")
@click.option("--data", default="data/airfield", show_default=True, help="Data set with ground truth.")
@option(PromotionRequest, "split", default="test", help="Split of a data folder to evaluate on.")
@click.option("--metric", default="auto", show_default=True, help="AP, AP50, IoU, Dice, ...; auto: the kind's main one.")
@click.option("--minimum", default=0.0, show_default=True, type=float, help="Least value of the metric.")
@click.option("--min-gain", default=0.0, show_default=True, type=float, help="Least gain; below 0 allows a loss.")
@option(PromotionRequest, "gates", default="none", help="YAML file instead of --metric; auto: that of the model.")
@option(PromotionRequest, "device")
@friendly
def main(*, model: str, alias: str, data: str, split: str, gates: str, device: str, **one: Any) -> None:
    """Promote by one metric, or by gates from a file, as `planes-registry promote` does.

    Exit code 0: promoted or already there; 2: the gates refused.
    """
    registry = Registry.connect()
    given, file = None, None if gates == "auto" else gates
    if gates == "none":
        metric = (
            main_metric(registry, registered(registry, registry.group(model)[0]))
            if one["metric"] == "auto"
            else one["metric"]
        )
        bounds = {"minimum": one["minimum"], "min_gain": one["min_gain"]}
        given = parse_gates({"gates": {"production": {"metrics": {metric: bounds}}}}, "options")
    verdict = promote(
        registry,
        PromotionRequest(model=model, alias=alias, data=(data,), split=split, device=device, gates=file),
        TERMINAL,
        given=given,
    )
    record(**verdict.facts)
    if not verdict.passed:
        end(NOT_PASSED, "a gate failed; the alias was not moved")


if __name__ == "__main__":
    main()
