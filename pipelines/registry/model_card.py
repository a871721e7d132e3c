"""The model card: a version's description in MLflow, made anew of what is known whenever something becomes known."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from statistics import mean, stdev

from mlflow.entities.model_registry import ModelVersion

from models.errors import RegistryError
from models.saved.spec import ModelSpec
from pipelines.registry.gates import Check
from pipelines.registry.model_versions import Registry
from pipelines.tracking.mlflow_runs import store_errors

log = logging.getLogger(__name__)

FINDS = {
    "detector": "Finds {classes} as boxes.",
    "segmenter": "Outlines {classes} inside their boxes.",
    "instance_segmenter": "Finds and outlines {classes}.",
}
# In this order, those that were measured.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mask_AP", "mask_AP50", "mask_AP75", "IoU", "Dice")
# AP of small planes below which the card warns of them.
FEW = 0.1
# MLflow's longest description.
LONGEST = 5000


def write_card(
    registry: Registry, version: ModelVersion, spec: ModelSpec, *, alias: str = "", checks: Sequence[Check] = ()
) -> None:
    """Write a version's description, and of its model where that has none; a store that refuses costs only them.

    Args:
        alias: that it was promoted to, ``checks``: by these gates.
    """
    try:
        with store_errors(f"{version.name}/{version.version}: its description cannot be written"):
            current = registry.client.get_model_version(version.name, str(version.version))
            text = card(current, spec, registry.seeds_of(current), alias=alias, checks=checks)
            registry.client.update_model_version(version.name, str(version.version), description=text)
            model = registry.client.get_registered_model(version.name)
            if not model.description:
                registry.client.update_registered_model(version.name, description=about(spec))
    except RegistryError as error:
        log.info(str(error))


def about(spec: ModelSpec) -> str:
    """What a registered model is, in a sentence."""
    classes = ", ".join(spec.classes) + ("s" if len(spec.classes) == 1 else "")
    return FINDS.get(spec.kind, "{classes}").format(classes=classes)


def card(
    version: ModelVersion,
    spec: ModelSpec,
    group: Sequence[ModelVersion],
    *,
    alias: str = "",
    checks: Sequence[Check] = (),
) -> str:
    """The description as Markdown."""
    label, tags = f"{version.name}/{version.version}", version.tags
    lines = [f"{about(spec)} Engine: {spec.engine}.", "", f'    score --model {label} --data "photos/*.jpg"', ""]
    lines += _measured(tags, group)
    lines += ["", "**Data**: trained on " + _data(tags)]
    if "detector" in tags and "segmenter" in tags:
        lines += ["", f"**Parts**: {tags['detector']} and {tags['segmenter']}"]
    if "starts_from" in tags:
        lines += ["", f"**Starts from**: {tags['starts_from']}"]
    lines += ["", "**Limits**: " + "; ".join(_limits(tags, spec))]
    if alias:
        how = ", though gates failed:" if any(not c.passed for c in checks) else ", by these gates:" if checks else ""
        lines += ["", f"**Promoted to {alias}**{how}", ""]
        rows = [f"| {c.gate} | {c.required} | {c.candidate} | {'passed' if c.passed else 'FAILED'} |" for c in checks]
        lines += ["| gate | required | measured | result |", "|---|---|---|---|", *rows] if rows else []
    commit = tags.get("git_commit", "unknown")[:12] + (" with changes" if tags.get("git_changed") == "true" else "")
    lines += ["", f"**Made by** run `{version.run_id}` at commit {commit}"]
    text = "\n".join(lines)
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + "\n..."


def _measured(tags: dict[str, str], group: Sequence[ModelVersion]) -> list[str]:
    values = _metrics(tags)
    shown = [name for name in METRICS if name in values]
    if not shown:
        return ["**Not measured**: there was no test set, or its evaluation failed"]
    others = [m for m in (_metrics(v.tags) for v in group) if m]
    several = len(others) > 1
    head = ["| metric | this version |" + (f" {len(others)} seeds |" if several else ""), "|---|---|" + "---|" * several]
    rows = []
    for name in shown:
        known = [m[name] for m in others if name in m]
        spread = f" {mean(known):.3f} ± {stdev(known):.3f} |" if several and len(known) > 1 else " - |" * several
        rows.append(f"| {name} | {values[name]:.3f} |{spread}")
    noise = "" if several else "; one seed, so how much of it is chance is not known (`--seeds 3` tells)"
    return [f"**Measured** on the test set {tags.get('test_digest', 'unknown')}{noise}:", "", *head, *rows]


def _metrics(tags: dict[str, str]) -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(tags.get("metrics", "{}")).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _data(tags: dict[str, str]) -> str:
    return f"{tags.get('data', 'unknown')} (digest {tags.get('data_digest', 'unknown')})"


def _limits(tags: dict[str, str], spec: ModelSpec) -> list[str]:
    limits = []
    if spec.tiling is not None:
        zooms = "" if spec.tiling.zooms == (1.0,) else f" at scales {', '.join(f'{z:g}' for z in spec.tiling.zooms)}"
        turns = "" if spec.tiling.turns == 1 else f", in {spec.tiling.turns} looks at each image"
        limits.append(f"predicts by tiles of {spec.tiling.size} pixels{zooms}{turns}")
    rendering = spec.rendering.range if isinstance(spec.rendering.range, str) else "{} to {}".format(*spec.rendering.range)
    limits.append(f"reads values as {rendering}, bands {spec.rendering.bands or 'auto'}")
    small = _metrics(tags).get("APs")
    if small is not None and small < FEW:
        limits.append(f"planes below 32 x 32 pixels are hardly found (APs {small:.3f})")
    if spec.scores is not None:
        limits.append(f"best F1 from a score of {spec.scores.threshold:.3f} on {spec.scores.fitted_on}")
    elif spec.kind != "segmenter":
        limits.append("what its scores mean was not learnt: no validation scenes")
    return limits
