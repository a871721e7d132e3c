"""Commands of ``planes-registry`` that look at versions, copy them and sweep those that nobody needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from pipelines.registry import copying, lineage
from pipelines.registry.model_versions import Registry
from pipelines.registry.twins import delete_left, unnamed_twins
from pipelines.registry.verification import verify
from pipelines.steps.reporting import record
from pipelines.tables import text_table


def list_versions(models: Sequence[str], as_json: bool) -> None:
    """A table of versions."""
    registry = Registry.connect()
    rows = lineage.overview(registry, models)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        click.echo(text_table(rows, "keys"))
    else:
        click.echo("nothing is registered here yet; train a model first")


def show_version(text: str, as_json: bool) -> None:
    """A version's lineage."""
    registry = Registry.connect()
    facts = lineage.lineage(registry, registry.resolve(text))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        lines = _lines(value)
        click.echo(f"{key:<{width}}  {lines[0]}")
        for line in lines[1:]:
            click.echo(f"{'':<{width}}  {line}")


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return ["  ".join(f"{k} {v:.4g}" for k, v in value.items()) or "none"]
    return [str(v) for v in value] or ["none"] if isinstance(value, list) else [str(value) or "none"]


def show_difference(first: str, second: str, as_json: bool) -> None:
    """What differs between two versions."""
    registry = Registry.connect()
    pair = registry.resolve(first), registry.resolve(second)
    rows, code = lineage.difference(registry, *pair), lineage.code_difference(registry, *pair)
    if as_json:
        keys = ("section", "key", pair[0].label, pair[1].label)
        click.echo(json.dumps({"rows": [dict(zip(keys, r, strict=True)) for r in rows], "code": code}, indent=2))
        return
    if not rows:
        click.echo(f"{pair[0].label} and {pair[1].label}: the same params, metrics, data, code and files")
        return
    heads = ["", "", pair[0].label, pair[1].label]
    click.echo(text_table(rows, heads, [None, 40, 50, 50]))
    if code:
        click.echo(code)


def verify_version(text: str) -> bool:
    """Whether nothing that was looked at is wrong."""
    registry = Registry.connect()
    version = registry.resolve(text)
    findings = verify(registry, version)
    words = {True: "ok", False: "FAIL", None: "?"}
    rows = [[words[f.passed], f.what, f.result] for f in findings]
    click.echo(f"{version.label}:\n{text_table(rows)}")
    record(version=version.label, findings=[asdict(one) for one in findings])
    return all(f.passed is not False for f in findings)


def copy(text: str, name: str, server: str | None) -> None:
    """Copy a version to another registered model."""
    registry = Registry.connect()
    version = registry.resolve(text)
    copied = copying.copy_version(registry, version, name, Registry.connect(server) if server else None)
    click.echo(f"{version.label} is {copied.label}" + (f" on {server}" if server else ""))
    record(version=version.label, copy=copied.label, server=server)


def _mark_deleted(swept: Sequence[dict[str, Any]], name: str) -> None:
    next(one for one in swept if one["name"] == name)["deleted"] = True


def sweep(models: Sequence[str], *, keep: int, dry_run: bool, yes: bool) -> None:
    """Tell which versions, and twins that a killed command left, nothing names; delete them after asking."""
    registry = Registry.connect()
    names = models or registry.registered_names()
    if not names:
        click.echo("nothing is registered here yet")
    swept: list[dict[str, Any]] = []
    for name in names:
        registry.aliases_of(name)
        kept = lineage.sweep(registry, name, keep)
        unnamed = [k.version for k in kept if not k.reason]
        rows = [[f"{name}/{k.version}", "keep" if k.reason else "delete", k.reason or "nothing names it"] for k in kept]
        left = unnamed_twins(registry, name)
        rows += [[f"{twin.name} {twin.model_id}", "delete", "a twin that no version names"] for twin in left]
        click.echo(text_table(rows))
        swept += [{"name": what, "decision": decision, "why": why, "deleted": False} for what, decision, why in rows]
        record(swept=swept)
        if dry_run or not (unnamed or left):
            continue
        what = " and ".join(f"{len(of)} {kind}" for of, kind in ((unnamed, "versions"), (left, "twins")) if of)
        if not yes and not click.confirm(f"Delete {what} of {name}?", default=False):
            continue
        for twin in left:
            delete_left(registry, twin)
            _mark_deleted(swept, f"{twin.name} {twin.model_id}")
            click.echo(f"{twin.name} {twin.model_id} deleted; its artefacts stay until `mlflow gc`")
        for version in unnamed:
            lineage.delete(registry, name, version, keep)
            _mark_deleted(swept, f"{name}/{version}")
            click.echo(f"{name}/{version} deleted; its artefacts stay until `mlflow gc`")
