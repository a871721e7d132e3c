"""The ``planes-registry`` command. Imports of ours stay inside the commands: ``--help`` must answer at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pipelines.steps.commands import Group
from pipelines.steps.options import option
from pipelines.steps.reporting import NOT_PASSED, end
from pipelines.use_cases.requests import AccelerateRequest, PromotionRequest

DEVICE = option(PromotionRequest, "device")
JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")
ALIAS = click.option("--alias", default="production", show_default=True, help="Alias to move back.")


@click.group(
    cls=Group,
    context_settings={"max_content_width": 110},
    env="PLANES_REGISTRY",
    examples=(
        "planes-registry promote planes-det 7 --to production",
        "planes-registry rollback planes-det",
        "planes-registry show planes-det/production",
    ),
)
@click.version_option(package_name="planes")
def main() -> None:
    """Look after registered models: what there is, where it comes from, what is in production, and the way back."""


def _run(function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of our steps (``module:name``) with our errors as one line."""
    import importlib

    from pipelines.start_up import importing
    from pipelines.steps.cli_support import friendly

    module, name = function.split(":")

    def call() -> Any:
        with importing():
            target: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return target(*arguments, **options)

    return friendly(call)()


def _named(model: str, version: str | None) -> str:
    """``planes-det 7`` and ``planes-det/7`` mean the same; without a version the newest."""
    if version is not None:
        return f"{model}/{version}"
    return model if "/" in model or "@" in model else f"{model}/latest"


@main.command(
    headings={
        "What, and where to": ("target",),
        "Gates": ("gates", "data", "split", "device"),
        "Deciding": ("dry_run", "force", "reason"),
    },
    examples=("planes-registry promote planes-det 7 --to production",),
    reports=True,
)
@click.argument("model")
@click.argument("version", required=False)
@click.option("--to", "target", required=True, help="ALIAS, or NAME@ALIAS to copy the version to another model first.")
@option(PromotionRequest, "gates")
@option(PromotionRequest, "data")
@option(PromotionRequest, "split")
@option(PromotionRequest, "dry_run")
@option(PromotionRequest, "force")
@option(PromotionRequest, "reason")
@DEVICE
def promote(*, model: str, version: str | None, target: str, force: bool, reason: str, **options: Any) -> None:
    """Evaluate MODEL VERSION and the one in its place afresh, judge by the gates, and move the alias.

    Exit code 0: moved, or there already; 2: a gate failed, nothing was moved.
    """
    if force and not reason.strip():
        raise click.UsageError("--force needs --reason TEXT: the history must tell why")
    if not _run(
        "pipelines.steps.alias_commands:promote_version",
        _named(model, version),
        target,
        force=force,
        reason=reason,
        **options,
    ):
        end(NOT_PASSED, "a gate failed; the alias was not moved")


@main.command(
    headings={"What": ("precisions", "device"), "Gates": ("gates", "data", "split", "calibration")},
    examples=("planes-registry accelerate planes-det/production --data data/airfield --calibration data/airfield",),
    reports=True,
)
@click.argument("model")
@click.argument("version", required=False)
@option(
    AccelerateRequest,
    "precisions",
    "--precision",
    multiple=True,
    default=(),
    type=click.Choice(["f32", "bf16", "int8", "bf16-mixed", "16-mixed"]),
)
@option(AccelerateRequest, "device")
@option(AccelerateRequest, "gates")
@option(AccelerateRequest, "data")
@option(AccelerateRequest, "split")
@option(AccelerateRequest, "calibration")
def accelerate(model: str, version: str | None, **options: Any) -> None:
    """Convert MODEL VERSION to OpenVINO, measure both side by side, and name as its twins what passes the gates.

    `score` takes the fastest twin that this CPU can compute. With --device cuda nothing is converted: half precision
    is measured on that GPU, and `score` takes what passed. Exit code 0: each precision was approved; 2: one was not.
    """
    if not _run("pipelines.steps.alias_commands:accelerate_version", _named(model, version), **options):
        end(NOT_PASSED, "a precision was not approved")


@main.command(reports=True, examples=('planes-registry rollback planes-det --reason "misses everything"',))
@click.argument("model")
@ALIAS
@click.option("--version", default=None, help="Version to go to, instead of the one that was there before.")
@click.option("--reason", default="rolled back", show_default=True, help="Why, for the history.")
@click.option("--unchecked", is_flag=True, help="Do not load the version first to see that it works.")
def rollback(model: str, **options: Any) -> None:
    """Move an alias of MODEL back to the version that it pointed to before; no gates, no data, seconds."""
    _run("pipelines.steps.alias_commands:roll_back", model, **options)


@main.command(examples=("planes-registry history planes-det",))
@click.argument("model")
@click.option("--alias", default=None, help="Moves of this alias alone.")
@JSON
def history(model: str, alias: str | None, as_json: bool) -> None:
    """Tell every move of MODEL's aliases: when, from which version to which, by whom, why."""
    _run("pipelines.steps.alias_commands:tell_history", model, alias, as_json)


@main.command(name="list", examples=("planes-registry list planes-det",))
@click.argument("models", nargs=-1)
@JSON
def list_versions(models: tuple[str, ...], as_json: bool) -> None:
    """List registered MODELS (all without a name) with their versions, aliases and metrics."""
    _run("pipelines.steps.inspect_commands:list_versions", models, as_json)


@main.command(examples=("planes-registry show planes-det/production",))
@click.argument("model")
@click.argument("version", required=False)
@JSON
def show(model: str, version: str | None, as_json: bool) -> None:
    """Show where MODEL VERSION comes from (data, code, run, parts), its gates and moves, and what uses it."""
    _run("pipelines.steps.inspect_commands:show_version", _named(model, version), as_json)


@main.command(examples=("planes-registry diff planes-det/6 planes-det/7",))
@click.argument("first")
@click.argument("second")
@JSON
def diff(first: str, second: str, as_json: bool) -> None:
    """Show how two versions differ: params, metrics, data, code."""
    _run("pipelines.steps.inspect_commands:show_difference", first, second, as_json)


@main.command(reports=True, examples=("planes-registry verify planes-det/production",))
@click.argument("model")
@click.argument("version", required=False)
def verify(model: str, version: str | None) -> None:
    """Hash MODEL VERSION's files again, load it, predict its example, hold that against what was logged.

    Exit code 0: all is as it was; 1: it is not.
    """
    if not _run("pipelines.steps.inspect_commands:verify_version", _named(model, version)):
        end(1, "the version is not as it was registered")


@main.command(reports=True, examples=("planes-registry copy dev.planes-det/7 prod.planes-det",))
@click.argument("version")
@click.argument("name")
@click.option("--to-server", default=None, help="Tracking URI of another server; without it the copy stays in this one.")
def copy(version: str, name: str, to_server: str | None) -> None:
    """Copy VERSION (dev.planes-det/7) to the registered model NAME (prod.planes-det)."""
    _run("pipelines.steps.inspect_commands:copy", version, name, to_server)


@main.command(reports=True, examples=("planes-registry gc --dry-run",))
@click.argument("models", nargs=-1)
@click.option("--keep", default=3, show_default=True, type=click.IntRange(1), help="Newest versions that always stay.")
@click.option("--dry-run", is_flag=True, help="Only tell.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def gc(*, models: tuple[str, ...], keep: int, dry_run: bool, yes: bool) -> None:
    """Delete versions that nothing names: no alias or stage, composition, scoring run or move of an alias.

    Artefacts stay until MLflow's own `mlflow gc`.
    """
    _run("pipelines.steps.inspect_commands:sweep", models, keep=keep, dry_run=dry_run, yes=yes)


if __name__ == "__main__":
    main()
