"""The pages: links lead somewhere, and every command on them has the options that it is shown with."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from mlflow.projects.utils import load_project

from pipelines.steps.registry_cli import main as registry
from scoring.cli import main as score
from scoring.planes import main as planes

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", page.read_text()), re.M)
    plain = (re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", h) for h in headings)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in plain}


def test_the_site_builds_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {page.stem for page in tmp_path.glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= pages
    # Nothing of the pages comes from the network.
    for page in tmp_path.glob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"https?:", page.read_text()), page.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    for target in targets:
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target}"


def test_every_page_is_named_by_the_readme():
    text = (ROOT / "README.md").read_text()
    of_the_site = {"index.md", "api.md"}
    assert not [p.name for p in (ROOT / "docs").glob("*.md") if f"(docs/{p.name}" not in text and p.name not in of_the_site]


def _commands() -> list[tuple[str, str]]:
    """(page, line) of each of our commands in the pages' code."""
    found = []
    for page in PAGES:
        for _, block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+#.*$", "", line).strip()
                if re.match(r"(\S*/)?(score|planes|planes-registry) |python -m pipelines\.steps\.|mlflow run ", command):
                    found.append((page.name, command))
    return found


def _parse(command: click.Command, arguments: list[str]) -> None:
    """As click does before it calls; of groups the command that is named first."""
    while isinstance(command, click.Group) and arguments:
        named = command.get_command(click.Context(command), arguments[0])
        if named is None:
            break
        command, arguments = named, arguments[1:]
    command.make_context("command", list(arguments))


@pytest.mark.parametrize(("page", "line"), _commands())
def test_commands_are_called_as_shown(page, line):
    words = shlex.split(line)
    if words[:2] == ["mlflow", "run"]:
        entry = words[words.index("-e") + 1] if "-e" in words else "main"
        point = load_project(str(ROOT)).get_entry_point(entry)
        given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-P")
        assert set(given) <= set(point.parameters), line
        words = shlex.split(point.compute_command(given, storage_dir=None))
    if words[0] == "python":
        module = import_module(words[2])
        _parse(module.main, words[3:])
    else:
        _parse({"score": score, "planes": planes, "planes-registry": registry}[Path(words[0]).name], words[1:])


def test_commands_were_found():
    assert len(_commands()) > 60


@pytest.mark.parametrize("line", ["compare a --nothing 1", "--model m --tille 3", "export"])
def test_a_wrong_option_would_be_noticed(line):
    with pytest.raises(click.UsageError):
        _parse(score, line.split())
