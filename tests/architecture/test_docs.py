"""The pages: links lead somewhere, and every command on them has the options that it is shown with."""

from __future__ import annotations

import json
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
from tests.pages.blocks import PAGES, ROOT, read_blocks
from tests.pages.substitutions import SUBSTITUTIONS

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
    ours = re.compile(r"(\S*/)?(score|planes|planes-registry) |python -m pipelines\.steps\.|mlflow run ")
    return [
        (page.name, command)
        for page in PAGES
        for block in read_blocks(page)
        for command in block.commands
        if ours.match(command)
    ]


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


def test_every_block_is_run_or_says_why_not():
    """`make test-docs` runs what is not marked; a command that it does not know would be passed over."""
    faults = [fault for page in PAGES for block in read_blocks(page) for fault in block.faults()]
    assert not faults, "\n".join(faults)
    run = [c for page in PAGES for block in read_blocks(page) for c in block.commands if not block.why_not(c)]
    assert len(run) > 60


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```\nrm -rf mlruns\n```", "README.md:1: rm -rf mlruns: neither run nor marked"),
        ("```bash\nscore --model a --data b\n```", "language 'bash'"),
        ("<!-- not run: -->\n```\nls\n```", "a mark without a reason"),
        ("<!-- not run (cd): it needs a shell -->\n```\nmake demo\n```", "the mark (cd) is of no command here"),
        ("<!-- not run: it needs a shell -->\nText.\n```\nls\n```", "ls: neither run nor marked"),
    ],
)
def test_a_block_that_would_be_passed_over_is_refused(text, said):
    (block,) = read_blocks(PAGES[0], text)
    assert said in "\n".join(block.faults())


def test_a_mark_says_what_is_left_out():
    text = "<!-- not run (pip install): nothing is installed -->\n\n```\npip install a  # once\nscore \\\n    --data b\n```"
    (block,) = read_blocks(PAGES[0], text)
    assert block.commands == ["pip install a", "score --data b"]
    assert [bool(block.why_not(command)) for command in block.commands] == [True, False]
    assert not block.faults()


def test_every_substitution_is_of_a_command_on_a_page():
    shown = [c for page in PAGES for block in read_blocks(page) for c in (*block.commands, block.text)]
    used = set()
    for text in shown:
        for one in SUBSTITUTIONS:
            changed = one(text)
            used |= {one} if changed != text else set()
            text = changed
    # What `mlflow run` makes of its entry points is substituted too.
    assert {one.why for one in SUBSTITUTIONS if one not in used} == set()


def test_the_notebook_is_kept_without_outputs():
    """What a run leaves in it would be neither true for long nor readable in a review."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 6
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert [cell["id"] for cell in code if "parameters" in cell["metadata"].get("tags", ())] == ["cell-01"]
