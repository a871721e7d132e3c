"""Commands of ``planes-registry`` that judge by gates or move aliases, and the one that tells what was moved.

What loads networks is imported on use: a rollback, or a look at the history, should not wait for it.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from models.errors import RegistryError
from models.runtime.devices import HalfPrecisionKind, TwinPrecision
from pipelines.registry import journal, promotion
from pipelines.registry.model_versions import Registry
from pipelines.steps.cli_support import TERMINAL
from pipelines.steps.reporting import record
from pipelines.tables import text_table
from pipelines.use_cases.requests import AccelerateRequest, PromotionRequest
from pipelines.use_cases.rollback import rollback


def accelerate_version(
    model: str,
    *,
    precisions: tuple[TwinPrecision | HalfPrecisionKind, ...],
    device: str,
    gates: str | None,
    data: tuple[str, ...],
    split: str | None,
    calibration: str | None,
) -> bool:
    """Make and measure twins, or half precisions on a GPU. False where one was not approved."""
    from pipelines.use_cases.accelerate import accelerate

    request = AccelerateRequest(
        model=model,
        precisions=tuple(dict.fromkeys(precisions)) or None,
        device=device,
        gates=gates,
        data=data,
        split=split,
        calibration=calibration,
    )
    result = accelerate(Registry.connect(), request, TERMINAL)
    approved = {one.precision: one.model_dump(mode="json") for one in (*result.twins, *result.gpu_precisions)}
    checks = {precision: [asdict(one) for one in found] for precision, found in result.checks.items()}
    record(version=model, device=device, approved=approved, checks=checks)
    return result.all_approved


def promote_version(
    model: str,
    target: str,
    *,
    gates: str | None,
    data: tuple[str, ...],
    split: str | None,
    dry_run: bool,
    force: bool,
    reason: str,
    device: str,
) -> bool:
    """Promote; with ``NAME@ALIAS`` as target a copy of the version in that model. False where a gate failed."""
    from pipelines.registry.copying import copy_version
    from pipelines.use_cases.promote import promote

    registry = Registry.connect()
    name, sign, alias = target.rpartition("@")
    promotion.checked_alias(alias)
    if sign and name != registry.resolve(model).name:
        version = registry.resolve(model)
        if dry_run:
            raise RegistryError(f"--dry-run: {version.label} has no copy in {name} yet; give --to {alias} to try its gates")
        copied = copy_version(registry, version, name)
        click.echo(f"{version.label} is {copied.label} there")
        model = copied.label
    request = PromotionRequest(
        model=model,
        alias=alias,
        data=data,
        split=split,
        device=device,
        gates=gates,
        dry_run=dry_run,
        force=force,
        reason=reason,
    )
    verdict = promote(registry, request, TERMINAL)
    record(**verdict.facts)
    return verdict.passed or force


def roll_back(name: str, alias: str, *, version: str | None, reason: str, unchecked: bool) -> None:
    """Move an alias back, once the version that it goes to is seen to load."""
    target = rollback(Registry.connect(), name, alias, version=version, reason=reason, unchecked=unchecked)
    record(version=target.label, alias=alias)


def tell_history(name: str, alias: str | None, as_json: bool) -> None:
    """All moves, oldest first, and where the aliases stand now."""
    registry = Registry.connect()
    aliases = registry.aliases_of(name)
    entries = [e for e in journal.read_journal(registry, name) if alias in (None, e.move.alias)]
    if as_json:
        click.echo(json.dumps({"aliases": aliases, "moves": [asdict(e) for e in entries]}, indent=2))
        return
    rows = [
        [e.number, e.at, e.move.alias, f"{e.move.origin or 'none'} -> {e.move.to}", e.move.kind, e.by, e.state, e.move.why]
        for e in entries
    ]
    head = ["", "when", "alias", "version", "how", "by", "state", "why"]
    widths = [None] * (len(head) - 1) + [70]
    table = text_table(rows, head, widths)
    click.echo(table if rows else f"{name}: nothing was moved")
    click.echo("now: " + (", ".join(f"{k} -> {v}" for k, v in sorted(aliases.items())) or "no aliases"))
    champions = {e.move.to for e in entries if e.move.alias == promotion.PRODUCTION}
    for moved in sorted({e.move.alias for e in entries}):
        last = journal.effective_entries(entries, moved)[-1]
        if last.state == "pending":
            click.echo(f"{moved}: the last move was interrupted; the next promote or rollback finishes it first")
        elif moved == promotion.CHALLENGER and moved not in aliases and last.move.to in champions:
            click.echo(f"{moved}: version {last.move.to} went on to {promotion.PRODUCTION}")
        elif last.state == "committed" and aliases.get(moved) != last.move.to:
            click.echo(f"{moved}: stands at {aliases.get(moved, 'none')}, moved past planes-registry since")
