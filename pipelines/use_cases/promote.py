"""A version promoted: gates evaluated on data, the verdict recorded as a run, the alias moved."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlflow

from models.errors import DataError, PlanesError, RegistryError, did_you_mean, one_line
from models.loading import load_model
from models.runtime.devices import pick_device
from models.saved.allowed_files import WEIGHTS_FILE
from models.saved.spec import read_spec
from pipelines.data.dataset import Dataset
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.categories import category_of, common_category
from pipelines.evaluation.inference import MAIN_METRIC
from pipelines.evaluation.metrics import check_metric
from pipelines.evaluation.side_by_side import Measurement, measure
from pipelines.registry import lineage
from pipelines.registry.gates import (
    Check,
    GateFile,
    Gates,
    RequiredData,
    find_gates,
    judge,
    judge_data,
    judge_group,
    judge_images,
    judge_size,
)
from pipelines.registry.model_card import write_card
from pipelines.registry.model_versions import GROUP, Registry, Resolved
from pipelines.registry.promotion import CHALLENGER, PRODUCTION, AliasState, checked_alias, move, read_alias_state
from pipelines.tables import text_table
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.display import SILENT, Display
from pipelines.use_cases.requests import WORK_DIR, PromotionRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """The gates' results; none where the alias was there already.

    Attributes:
        checks: every gate's result.
        candidate: the version that was judged, such as ``planes-det/7``.
        baseline: the one that it was held against; None where there was none.
        alias: that was to move.
        moved: whether it did.
        run_id: of the MLflow run of the decision.
    """

    checks: list[Check] = field(default_factory=list)
    candidate: str = ""
    baseline: str | None = None
    alias: str = ""
    moved: bool = False
    run_id: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate was passed."""
        return all(check.passed for check in self.checks)

    @property
    def facts(self) -> dict[str, Any]:
        """What a script asks for, as plain values."""
        return {**asdict(self), "passed": self.passed}


def promote(
    registry: Registry, request: PromotionRequest, display: Display = SILENT, *, given: GateFile | None = None
) -> Verdict:
    """Evaluate candidate and baseline afresh, judge, log a run, and move the alias.

    Raises:
        PlanesError: model, data, gates or store that cannot be used; another promotion was faster.
    """
    members = _newest_of_each_seed(registry, [registered(registry, one) for one in registry.group(request.model)])
    candidate = _median(registry, members)
    name, alias = str(candidate.name), checked_alias(request.alias)
    at = read_alias_state(registry, name, alias, look_only=request.dry_run)
    if at.finished is not None:
        log.info(f"finished a move that was interrupted: {lineage.format_entry(at.finished)}")
    if len(members) > 1 and at.version in [v.version for v in members]:
        raise RegistryError(f"{request.model}: holds {name}/{at.version}, which is {alias}; name those that are to beat it")
    if at.version == candidate.version:
        log.info(f"{candidate.label} is {alias} already")
        return Verdict(candidate=candidate.label, alias=alias)
    if at.version is None:
        near = did_you_mean(alias, {PRODUCTION, CHALLENGER, *registry.aliases_of(name)} - {alias}, 0.8)
        if near:
            log.info(f"{name}: {alias} is a new alias{near}")
    file, source = (given, "options") if given else find_gates(name, request.gates)
    gates = file.of(alias)
    baseline = _held_against(registry, at, gates, candidate)
    if len(members) > 1 and baseline is not None and baseline.label in [v.label for v in members]:
        raise RegistryError(f"{request.model}: holds the baseline, {baseline.label}; name those that are to beat it")
    title = f"promote {candidate.label} to {alias}"
    with mlflow_runs.tracked_run(
        registry.client, title, {"task": "promote", "version": candidate.label, "alias": alias}
    ) as run:
        params = {k: v for k, v in request.__dict__.items() if k not in ("data", "model")}
        against = baseline.label if baseline else "none"
        mlflow_runs.log_params(
            {**params, "data": " ".join(request.data), "candidate": candidate.label, "baseline": against}
        )
        mlflow.log_dict(file.model_dump(), "gates.yaml")
        if not request.dry_run:
            # Said before hours of evaluation, not after them, to those who may only read.
            _note_run(registry, candidate, run.info.run_id)
        checks = _forgiving(
            request,
            lambda: _check(
                registry, display, request, candidate=candidate, baseline=baseline, gates=gates, file=file, members=members
            ),
        )
        table = show_checks(checks)
        log.info(f"gates of {source}, {candidate.label} against {against}:\n{table}")
        mlflow.log_text(table + "\n", "checks.txt")
        mlflow.log_dict({"checks": [c.__dict__ for c in checks]}, "checks.json")
        moved = _decide(registry, request, at, candidate=candidate, checks=checks, run=run.info.run_id)
        log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, run.info.run_id)}")
    held_against = baseline.label if baseline else None
    return Verdict(checks, candidate.label, held_against, alias, moved, run.info.run_id)


def registered(registry: Registry, model: str) -> Resolved:
    """The registered version that a user names.

    Raises:
        RegistryError: a saved folder, or nothing of that name.
    """
    candidate = registry.resolve(model)
    if candidate.name is None or candidate.version is None:
        raise RegistryError(f"{model}: a saved folder; only a registered version can be promoted")
    return candidate


def _median(registry: Registry, members: Sequence[Resolved]) -> Resolved:
    """Of a group the version with the (lower) median of the main metric that was measured when it was trained.

    The best one would owe some of its lead to chance.
    """
    if len(members) == 1:
        return members[0]
    metric = main_metric(registry, members[0])
    values = [json.loads(registry.version_of(v).tags.get("metrics", "{}")).get(metric, -1.0) for v in members]
    chosen = members[sorted(range(len(members)), key=values.__getitem__)[(len(members) - 1) // 2]]
    log.info(f"{chosen.label} has the median {metric} of {len(members)} versions and stands for them")
    return chosen


def _newest_of_each_seed(registry: Registry, members: Sequence[Resolved]) -> list[Resolved]:
    """A group without versions of a seed that was trained again: the same seed twice would make the noise look smaller."""
    newest: dict[object, Resolved] = {}
    for version in sorted(members, key=lambda v: int(str(v.version))):
        tags = registry.version_of(version).tags
        known = (tags[GROUP], tags.get("seed")) if tags.get(GROUP) else version.label
        if known in newest:
            log.info(f"{newest[known].label} and {version.label} are of one seed; {version.label} counts")
        newest[known] = version
    return list(newest.values())


def _describe(registry: Registry, candidate: Resolved, alias: str, checks: Sequence[Check]) -> None:
    """Write the version's card; the alias has moved, whatever becomes of it."""
    try:
        write_card(
            registry, registry.version_of(candidate), read_spec(registry.fetch(candidate)), alias=alias, checks=checks
        )
    except PlanesError as error:
        log.info(f"{candidate.label}: its description was not written ({one_line(error)})")


def _of_one_group(registry: Registry, version: Resolved) -> list[Resolved]:
    """All versions that were trained with a version, differing in their seed alone."""
    group = registry.seeds_of(registry.version_of(version))
    return [version] if len(group) == 1 else [registry.resolve(f"{version.name}/{one.version}") for one in group]


def main_metric(registry: Registry, version: Resolved) -> str:
    """The metric that a version's kind is judged by where nobody names one."""
    return MAIN_METRIC.get(read_spec(registry.fetch(version)).kind, "AP")


def _held_against(registry: Registry, at: AliasState, gates: Gates, candidate: Resolved) -> Resolved | None:
    """The version that the gates compare with, if there is one."""
    number = at.version if gates.against is None else registry.find_alias(at.name, gates.against)
    return None if number in (None, candidate.version) else registry.resolve(f"{at.name}/{number}")


def open_gate_data(model: str, data: Sequence[str], split: str | None, file: GateFile, *, category: str) -> list[Dataset]:
    """The data sets that gates are evaluated on: ``data`` in place of the file's, and ``split`` of theirs.

    Raises:
        RegistryError: there are none.
        DataError: one cannot be opened.
    """
    wanted = [RequiredData(path=p, split=split or "test") for p in data] or file.data
    if not wanted:
        raise RegistryError(f"{model}: its gates name no data; give --data, a data set with ground truth")
    datasets = [open_dataset(d.path, split or d.split, category=category, keep=True) for d in wanted]
    for dataset in datasets:
        log.info(dataset.summary())
    return datasets


def _note_run(registry: Registry, candidate: Resolved, run_id: str) -> None:
    assert candidate.name is not None
    assert candidate.version is not None
    registry.client.set_model_version_tag(candidate.name, candidate.version, "last_gates_run", run_id)


def _forgiving(request: PromotionRequest, check: Callable[[], list[Check]]) -> list[Check]:
    """The checks; data that cannot be had is a failed one for those who force the move."""
    try:
        return check()
    except DataError as error:
        if not request.force:
            raise
        return [Check("evaluation", "-", "possible", one_line(error), "-", False)]


def _check(
    registry: Registry,
    display: Display,
    request: PromotionRequest,
    *,
    candidate: Resolved,
    baseline: Resolved | None,
    gates: Gates,
    file: GateFile,
    members: Sequence[Resolved],
) -> list[Check]:
    """All gates on all data sets."""
    device = pick_device(request.device)
    versions = [candidate] if baseline is None else [candidate, baseline]
    # Of a group, the others of both sides are measured beside them.
    own = {v.label for v in members}
    rivals = [] if baseline is None or len(members) == 1 else _of_one_group(registry, baseline)
    rivals = [v for v in rivals if v.label not in own]
    measured_too = {v.label: v for v in (*versions, *(members if len(members) > 1 else ()), *rivals)}
    folders = {label: registry.fetch(v) for label, v in measured_too.items()}
    kind = read_spec(folders[candidate.label]).kind
    for metric in gates.metrics:
        check_metric(metric, kind)
    category = common_category({k: category_of(f, k, measured=gates.need_data) for k, f in folders.items()}, "promote")
    datasets = (
        open_gate_data(request.model, request.data, request.split, file, category=category)
        if gates.need_data or any(d.digest for d in file.data)
        else []
    )
    sizes = [sum(p.stat().st_size for p in folders[v.label].rglob(WEIGHTS_FILE)) / 1e6 for v in versions]
    trained_on = registry.version_of(candidate).tags.get("data_digest", "unknown")
    required = file.data if datasets else []
    checks = judge_data(required, [d.digest() for d in datasets])
    checks += _image_checks(registry, versions, datasets, trained_on)
    checks += judge_size(gates, sizes[0], None if baseline is None else sizes[1])
    main = MAIN_METRIC.get(kind, "AP")
    predictors = {label: load_model(folder, device) for label, folder in folders.items()} if datasets else {}
    renderings = {label: read_spec(folder).rendering for label, folder in folders.items()}
    for dataset in datasets:
        mlflow_runs.log_dataset(dataset, "promotion")
        with _kept(list(measured_too.values()), dataset, device) as kept:
            measured = measure(predictors, dataset, display.items, kept=kept, renderings=renderings)
        for role, version in zip(("candidate", "baseline"), versions, strict=False):
            prefix = f"{role}/" if len(datasets) == 1 else f"{role}/{dataset.name}/"
            mlflow_runs.log_evaluation(
                prefix, measured[version.label].evaluation, dataset, model_id=mlflow_runs.link_model(version.model_id)
            )
        theirs: Measurement | None = None if baseline is None else measured[baseline.label]
        checks += judge(gates, main, measured[candidate.label], theirs)
        if len(members) > 1:
            checks += judge_group(gates, [measured[v.label] for v in members], [measured[v.label] for v in rivals])
    return checks


def _image_checks(
    registry: Registry, versions: Sequence[Resolved], datasets: Sequence[Dataset], trained_on: str
) -> list[Check]:
    """The gates on training images; a list that cannot be read is a failed one."""
    if not datasets:
        return []
    try:
        known = [lineage.read_training_images(registry, v) for v in versions]
    except RegistryError as error:
        return [Check("images", "-", "a list that can be read", one_line(error), "-", False)]
    return judge_images(datasets, known[0], known[1] if len(known) > 1 else None, trained_on)


@contextmanager
def _kept(versions: Sequence[Resolved], dataset: Dataset, device: str) -> Iterator[Path]:
    """Where an interrupted evaluation of these versions on this data is gone on with; gone once it is complete."""
    content = [[v.label, v.digest] for v in versions], dataset.digest(), device
    path = Path(WORK_DIR) / "promotions" / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.jsonl"
    yield path
    path.unlink(missing_ok=True)


def show_checks(checks: Sequence[Check]) -> str:
    """The gates as a table for people."""
    rows = [["pass" if c.passed else "FAIL", c.gate, c.data, c.required, c.candidate, c.baseline] for c in checks] or [
        ["pass", "no gate", "-", "-", "-", "-"]
    ]
    heads = ["", "gate", "data", "required", "candidate", "baseline"]
    return text_table(rows, heads)


def _decide(
    registry: Registry, request: PromotionRequest, at: AliasState, *, candidate: Resolved, checks: list[Check], run: str
) -> bool:
    """Move the alias if the gates, or the user, say so; tag the run with the decision. Returns whether it moved."""
    failed = [c for c in checks if not c.passed]
    shown = failed or [c for c in checks if c.metric]
    listed = "; ".join(map(str, shown))
    summary = listed if failed else f"{len(checks)} gates passed{': ' if listed else ''}{listed}"
    reason = f"{request.reason} (failed: {summary})" if failed and request.force else request.reason or summary
    moves = (not failed or request.force) and not request.dry_run
    decision = "promoted" if moves else "dry run" if request.dry_run else "refused"
    mlflow.set_tags({"decision": decision, "reason": reason[:4000], "forced": str(bool(failed and request.force)).lower()})
    if not moves:
        would = "would be" if not failed or request.force else "would not be"
        verb = f"{would} promoted to {at.alias}" if request.dry_run else f"not promoted to {at.alias}"
        log.info(f"{candidate.label} {verb}: {reason}")
        return False
    try:
        move(registry, at, str(candidate.version), "force" if failed else "promote", reason, run=run)
    except RegistryError as error:
        mlflow.set_tags({"decision": "superseded", "reason": str(error)[:4000]})
        raise
    log.info(f"{candidate.label} is {at.alias} now: {reason}")
    _describe(registry, candidate, at.alias, checks)
    return True
