"""What commands tell scripts: ``--json``, ``--quiet`` and exit codes.

Only click is imported: ``--help`` and completion must answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from models.errors import one_line

FACTS, QUIET = "planes.facts", "planes.quiet"
NOT_PASSED, MANY_ERRORS, INTERRUPTED = 2, 3, 130


def report_options() -> list[click.Option]:
    """The options ``--json`` and ``--quiet``, for one command alone."""
    return [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the results as one JSON object, all else to stderr."),
        click.Option(["--quiet"], is_flag=True, help="Print errors only: no progress, no results."),
    ]


def record(**facts: Any) -> None:
    """Keep results for ``--json``; nothing where no command runs."""
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta.setdefault(FACTS, {}).update(facts)


def end(code: int, reason: str) -> NoReturn:
    """End a command with an exit code that is not 0, and record why.

    Raises:
        SystemExit: always.
    """
    record(error=reason)
    raise SystemExit(code)


def is_quiet() -> bool:
    """Whether the command that runs was called with ``--quiet``."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(QUIET))


def reporting(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command as `report_options` ask: then stdout holds the JSON object alone, or nothing.

    The object has ``command``, ``exit_code``, ``error`` (null where there is none) and what the command recorded.
    """

    @functools.wraps(callback)
    def run(*arguments: Any, as_json: bool, quiet: bool, **options: Any) -> Any:
        context = click.get_current_context()
        if context.invoked_subcommand:
            _refuse_before(context, context.invoked_subcommand)
        if context.invoked_subcommand or not (as_json or quiet):
            return callback(*arguments, **options)
        context.meta[QUIET] = quiet
        stdout = sys.stdout
        outcome: dict[str, Any] = {"command": context.command_path, "exit_code": 0, "error": None}
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if quiet else sys.stderr):
                return callback(*arguments, **options)
        except SystemExit as error:
            outcome["exit_code"] = error.code or 0
            raise
        except KeyboardInterrupt:
            outcome |= {"exit_code": INTERRUPTED, "error": "interrupted"}
            click.echo("Interrupted.", err=True)
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            # What is no click error is a mistake of ours, and goes on as a traceback.
            said = error.format_message() if isinstance(error, click.ClickException) else one_line(error)
            outcome |= {"exit_code": getattr(error, "exit_code", 1), "error": said}
            raise
        finally:
            if as_json:
                found = outcome | context.meta.get(FACTS, {})
                click.echo(json.dumps(_plain(found), indent=2), file=stdout)

    return run


def _refuse_before(context: click.Context, command: str) -> None:
    """Options of a group say nothing of its commands; in the environment they are meant for the group alone.

    Raises:
        click.UsageError: one stands on the command line.
    """
    for name in ("as_json", "quiet"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            said = "--json" if name == "as_json" else "--quiet"
            raise click.UsageError(f"{said} stands after the command: {context.command_path} {command} {said}", context)


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN and no infinity, numbers of NumPy as Python's, all else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
