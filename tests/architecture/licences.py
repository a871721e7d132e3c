"""Makes docs/licences.md of requirements.txt and the installed metadata: `python -m tests.architecture.licences`."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences

planes is licensed under Apache-2.0. What it is installed with, as the packages' own metadata names their licences; each of
them brings further packages. This page is made by `python -m tests.architecture.licences`.

| package | version | licence |
|---|---|---|
"""


def pins() -> dict[str, str]:
    """Package and version of each line of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))


def licence_of(package: str) -> str:
    """The licence that a package states: its expression, else its classifiers, else the field of free text, else its text.

    Raises:
        LookupError: it is not installed, or states none.
    """
    try:
        stated = metadata(package)
    except PackageNotFoundError as error:
        raise LookupError(f"{package}: not installed; pip install -r requirements.txt") from error
    if stated.get("License-Expression"):
        return str(stated["License-Expression"])
    named = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier") or () if c.startswith("License :: ")]
    # "OSI Approved" alone names none.
    named = [name for name in named if name != "OSI Approved"]
    free = (stated.get("License") or "").strip().partition("\n")[0].strip()
    if named:
        return ", ".join(named)
    if free:
        return free
    texts = [file for file in distribution(package).files or () if re.match(r"LICEN[SC]E", file.name)]
    first = next((line.strip() for file in texts for line in file.read_text().splitlines() if line.strip()), "")
    if not first:
        raise LookupError(f"{package}: its metadata names no licence, and holds no text of one")
    return f"not named; its text begins: {first}"


def page() -> str:
    """The whole page."""
    rows = [f"| {name} | {version} | {licence_of(name)} |" for name, version in sorted(pins().items())]
    return HEAD + "\n".join(rows) + "\n"


def rows_of(text: str) -> dict[str, tuple[str, str]]:
    """Version and licence by package, as a page states them."""
    return {
        name: (version, licence)
        for name, version, licence in re.findall(r"^\| ([\w-]+) \| (\d[\w.]*) \| (.+) \|$", text, re.M)
    }


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
