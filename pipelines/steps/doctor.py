"""The command ``planes doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from pipelines.steps.cli_support import friendly

SIGNS = {"ok": "ok", "optional": "--", "problem": "!!"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@friendly
def main(*, as_json: bool) -> None:
    """Say what of this machine and environment the commands find, and what to do where something is missing.

    Exit code 0: nothing is wrong (what is marked -- only some commands need); 1: something is.
    """
    from pipelines.start_up import importing

    with importing():
        from pipelines.use_cases.doctor import examine

    checks = examine()
    if as_json:
        click.echo(json.dumps([asdict(one) for one in checks], indent=2))
    else:
        width = max(len(one.name) for one in checks)
        for one in checks:
            remedy = f"; {one.remedy}" if one.remedy else ""
            click.echo(f"{SIGNS[one.state]}  {one.name:<{width}}  {one.found}{remedy}")
    if any(one.state == "problem" for one in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
