"""The command ``planes doctor``."""

from __future__ import annotations

from dataclasses import asdict

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.commands import Command
from pipelines.steps.reporting import end, record

SIGNS = {"ok": "ok", "optional": "--", "problem": "!!"}


@click.command(cls=Command, examples=("planes doctor",), reports=True)
@friendly
def main() -> None:
    """Say what of this machine and environment the commands find, and what to do where something is missing.

    Exit code 0: nothing is wrong (what is marked -- only some commands need); 1: something is.
    """
    from pipelines.start_up import importing

    with importing():
        from pipelines.use_cases.doctor import examine

    checks = examine()
    width = max(len(one.name) for one in checks)
    for one in checks:
        remedy = f"; {one.remedy}" if one.remedy else ""
        click.echo(f"{SIGNS[one.state]}  {one.name:<{width}}  {one.found}{remedy}")
    record(checks=[asdict(one) for one in checks])
    wrong = [one.name for one in checks if one.state == "problem"]
    if wrong:
        end(1, f"something is wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
