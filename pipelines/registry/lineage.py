"""Where a version comes from, where it is used, how two differ, and which nobody needs any more."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from models.errors import RegistryError
from models.saved.allowed_files import COMPONENTS
from pipelines.registry import journal
from pipelines.registry.gpu_precisions import gpu_precisions_of
from pipelines.registry.model_versions import DIGEST, Registry, Resolved
from pipelines.registry.training_images import TRAINING_IMAGES_FILE, TrainingImages
from pipelines.registry.twins import delete_unnamed, twins_of
from pipelines.tracking.mlflow_runs import store_errors

# Of a list of training images: some twenty million of them.
MOST_BYTES = 1_000_000_000


def overview(registry: Registry, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One row per version of the models, newest first: aliases, metrics, data, commit, engine.

    Raises:
        RegistryError: a name that is not registered.
    """
    rows = []
    for name in names or registry.registered_names():
        versions = registry.versions_of(name)
        if not versions:
            raise RegistryError(registry.no_such_model(name))
        aliases = _by_version(registry.aliases_of(name))
        for version in sorted(versions, key=lambda v: -int(v.version)):
            tags = version.tags
            twins = " ".join(_twins(version))
            row = {"version": f"{name}/{version.version}", "aliases": ", ".join(aliases.get(str(version.version), []))}
            row |= {"made": _date(version.creation_timestamp), "engine": tags.get("engine", ""), "twins": twins}
            row |= {
                "metrics": _main(tags),
                "data": tags.get("data_digest", "")[:8],
                "commit": tags.get("git_commit", "")[:8],
            }
            rows.append(row)
    return rows


def _by_version(aliases: Mapping[str, str]) -> dict[str, list[str]]:
    by_number: dict[str, list[str]] = {}
    for alias, number in sorted(aliases.items()):
        by_number.setdefault(number, []).append(alias)
    return by_number


def _main(tags: Mapping[str, str]) -> str:
    metrics = _metrics(tags)
    return "  ".join(f"{k} {metrics[k]:.3f}" for k in ("AP", "AP50", "mask_AP", "IoU", "Dice") if k in metrics)


def _metrics(tags: Mapping[str, str]) -> dict[str, float]:
    try:
        content = json.loads(tags.get("metrics", "{}"))
    except ValueError:
        return {}
    return {k: v for k, v in content.items() if isinstance(v, (int, float))} if isinstance(content, dict) else {}


def _twins(record: ModelVersion) -> dict[str, str]:
    """A version's twins by precision, the fastest first; a tag that names none is shown, and hinders no look at others."""
    try:
        return {twin.precision: f"{twin}, digest {twin.digest[:16]}" for twin in twins_of(record)}
    except RegistryError as error:
        return {"damaged": str(error)}


def _gpu_precisions(record: ModelVersion) -> dict[str, str]:
    """Half precisions that were approved on a GPU, the fastest first; a damaged tag is shown."""
    try:
        return {one.precision: str(one) for one in gpu_precisions_of(record)}
    except RegistryError as error:
        return {"damaged": str(error)}


def _date(milliseconds: int | None) -> str:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).strftime("%Y-%m-%d %H:%MZ")


def lineage(registry: Registry, version: Resolved) -> dict[str, Any]:
    """Everything that is known of a version: data, code, run, parts, gates, promotions, and who uses it.

    Raises:
        RegistryError: the store refuses.
    """
    record = registry.version_of(version)
    tags, run = record.tags, _run(registry, record.run_id)
    facts: dict[str, Any] = {"version": version.label, "made": _date(record.creation_timestamp)}
    facts["by"] = run.data.tags.get("mlflow.user", "unknown") if run else "unknown"
    facts["aliases"] = _by_version(registry.aliases_of(str(version.name))).get(str(version.version), [])
    facts["stage"] = record.current_stage or "None"
    facts["engine"], facts["recipe"] = tags.get("engine", "unknown"), tags.get("recipe", "none")
    facts["trained on"] = f"{tags.get('data', 'unknown')} (digest {tags.get('data_digest', 'unknown')})"
    images = read_training_images(registry, version)
    count = "not known" if images is None else str(len(images.images))
    facts["training images"] = "; not known of ".join([count, *(images.unknown if images else [])])
    facts["tested on"] = f"digest {tags.get('test_digest', 'none')}"
    changed = ", changed since" if tags.get("git_changed") == "true" else ""
    facts["code"] = f"commit {tags.get('git_commit', 'unknown')}{changed}"
    facts["run"] = f"{record.run_id} ({run.info.run_name})" if run else f"{record.run_id} (gone)"
    facts["parts"] = [f"{role}: {tags[role]}" for role in COMPONENTS if role in tags]
    facts["starts from"] = tags.get("starts_from", "")
    facts["copied from"] = tags.get("copied_from", "")
    facts["metrics"] = _metrics(tags)
    facts["files"] = f"digest {tags.get(DIGEST, 'none')}, weights sha256 {tags.get('weights_sha256', 'unknown')}"
    facts["twins"] = list(_twins(record).values())
    facts["on a GPU"] = list(_gpu_precisions(record).values())
    facts["gates"] = _gates(registry, _run(registry, tags.get("last_gates_run")))
    entries = journal.read_journal(registry, str(version.name))
    facts["moves"] = [format_entry(e) for e in entries if str(version.version) in (e.move.to, e.move.origin)]
    facts["used by"] = users(registry, version)
    return facts


def read_training_images(registry: Registry, version: Resolved) -> TrainingImages | None:
    """A version's training images; None where it has no list (registered before 0.6.1, or imported).

    Raises:
        RegistryError: the artefacts cannot be read, or are no such list.
    """
    return registry.read_parsed(version, TRAINING_IMAGES_FILE, TrainingImages, MOST_BYTES) if version.name else None


def _run(registry: Registry, run_id: str | None) -> Run | None:
    try:
        return registry.client.get_run(run_id) if run_id else None
    except mlflow.MlflowException:
        return None


def _gates(registry: Registry, run: Run | None) -> list[str]:
    """The checks of the last promotion, one line each."""
    if run is None:
        return []
    decision = f"{run.data.tags.get('decision', 'not decided')} (run {run.info.run_id}): {run.data.tags.get('reason', '')}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = registry.client.download_artifacts(run.info.run_id, "checks.json", folder)
            checks = json.loads(Path(path).read_bytes()).get("checks", [])
    except (mlflow.MlflowException, OSError, ValueError):
        return [decision]
    lines = [
        f"{'pass' if c['passed'] else 'FAIL'} {c['gate']} ({c['data']}): {c['candidate']}, "
        # "asked" until 0.6.1.
        f"required {c.get('required', c.get('asked'))}"
        for c in checks
    ]
    return [decision, *lines]


def format_entry(entry: journal.Entry) -> str:
    """A journal entry in one line."""
    what = entry.move
    state = {"committed": "", "pending": " [pending]", "superseded": " [superseded]", "aborted": " [aborted]"}[entry.state]
    return f"{entry.at} {what.alias}: {what.origin or 'none'} -> {what.to}, {what.kind} by {entry.by}{state}: {what.why}"


def users(registry: Registry, version: Resolved) -> list[str]:
    """What a version is used by: compositions that hold it, copies of it, and scoring runs."""
    client, uses = registry.client, []
    for role in COMPONENTS:
        # Only versions of planes-inst have such tags, of any name.
        for other in registry.search_versions(f"tags.{role} = '{version.label}'"):
            uses.append(f"{role} of {other.name}/{other.version}")
    for other in registry.search_versions(f"tags.copied_from = '{version.label}'"):
        # A copy from another server may have the very name that it had there.
        if f"{other.name}/{other.version}" != version.label:
            uses.append(f"copied to {other.name}/{other.version}")
    experiments = [e.experiment_id for e in client.search_experiments(max_results=1000)]
    quoted = version.label.replace("'", "")
    runs = client.search_runs(experiments, f"tags.task = 'score' and tags.version = '{quoted}'", max_results=1000)
    if runs:
        last = max(runs, key=lambda r: r.info.start_time)
        uses.append(f"{len(runs)} scoring runs, the last {_date(last.info.start_time)} (run {last.info.run_id})")
    return uses


def difference(registry: Registry, first: Resolved, second: Resolved) -> list[tuple[str, str, str, str]]:
    """How two versions differ: (section, key, value of the first, of the second), equal rows left out.

    Raises:
        RegistryError: the store refuses.
    """
    records = [registry.version_of(v) for v in (first, second)]
    runs = [_run(registry, r.run_id) for r in records]
    sections: dict[str, list[Mapping[str, Any]]] = {
        "params": [r.data.params if r else {} for r in runs],
        "metrics": [_metrics(r.tags) for r in records],
        "data": [_some(r, ("data", "data_digest", "test_digest")) for r in records],
        "code": [_some(r, ("git_commit", "git_changed", "engine", "recipe", *COMPONENTS)) for r in records],
        "files": [_some(r, (DIGEST, "weights_sha256")) for r in records],
        "twins": [_twins(r) for r in records],
        "on a GPU": [_gpu_precisions(r) for r in records],
    }
    rows = []
    for section, (ours, theirs) in sections.items():
        for key in sorted({*ours, *theirs}):
            left, right = (str(side.get(key, "-")) for side in (ours, theirs))
            if left != right:
                rows.append((section, key, left, right))
    return rows


def _some(record: ModelVersion, keys: Iterable[str]) -> dict[str, str]:
    return {k: record.tags[k] for k in keys if k in record.tags}


def code_difference(registry: Registry, first: Resolved, second: Resolved) -> str:
    """``git diff --stat`` between the commits of two versions; empty where git or the commits are not at hand."""
    commits = [registry.version_of(v).tags.get("git_commit", "unknown") for v in (first, second)]
    if "unknown" in commits or commits[0] == commits[1]:
        return ""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "diff", "--stat", *commits, "--", "models", "pipelines"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""


@dataclass(frozen=True)
class Kept:
    """A version and why it must stay; an empty reason: nothing names it."""

    version: str
    reason: str


def sweep(registry: Registry, name: str, keep_newest: int) -> list[Kept]:
    """For each version of a model, why it is needed: aliases, stages, compositions, the journal, runs of scoring, age.

    Raises:
        RegistryError: the store refuses.
    """
    aliases = _by_version(registry.aliases_of(name))
    versions = sorted(registry.versions_of(name), key=lambda v: -int(v.version))
    named: dict[str, str] = {}
    for entry in journal.read_journal(registry, name):
        for number in (entry.move.to, entry.move.origin):
            if number and entry.state in ("committed", "pending"):
                named[number] = f"was {entry.move.alias}"
    result = []
    for place, record in enumerate(versions):
        number = str(record.version)
        used = users(registry, registry.resolve(f"{name}/{number}"))
        reasons = [
            *aliases.get(number, []),
            *([record.current_stage] if record.current_stage not in (None, "None") else []),
        ]
        reasons += [named[number]] if number in named else []
        reasons += used + (["one of the newest"] if place < keep_newest else [])
        result.append(Kept(number, ", ".join(reasons)))
    return result


def delete(registry: Registry, name: str, version: str, keep_newest: int) -> None:
    """Delete a version that nothing names, looking once more, and its twins; artefacts stay until ``mlflow gc``.

    Raises:
        RegistryError: it is named by now, or the store refuses.
    """
    needed = next((k.reason for k in sweep(registry, name, keep_newest) if k.version == version), "")
    if needed:
        raise RegistryError(f"{name}/{version}: is needed by now ({needed})")
    record = registry.version_of(registry.resolve(f"{name}/{version}"))
    try:
        twins = twins_of(record)
    except RegistryError:
        # A tag that names none holds nothing that could be deleted with it.
        twins = []
    with store_errors(f"{name}/{version}: cannot be deleted"):
        registry.client.delete_model_version(name, version)
    for twin in twins:
        delete_unnamed(registry, twin.tag, record.tags[twin.tag])
