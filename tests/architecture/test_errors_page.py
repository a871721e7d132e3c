"""The page of errors: each message on it is one that the code says, and each exit code one that it ends with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipelines.steps import reporting

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text()
ROW = re.compile(r"^\| `([^`]+)` \| (.+) \| (.+) \|$", re.M)
MESSAGES = [match[1] for match in ROW.finditer(PAGE.split("## Data", 1)[1])]


def _template(node: ast.expr) -> Iterator[str]:
    """What a literal says, with the sign that stands for what varies; of sums of literals each."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values)


@cache
def said() -> list[str]:
    """Every text of the program."""
    return [
        text
        for package in ("models", "pipelines", "scoring")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.expr)
        for text in _template(node)
    ]


def is_said(message: str) -> bool:
    """Whether one text has all that does not vary of the message, in its order."""
    fixed = [re.escape(part.strip()) for part in message.split("…") if len(part.strip()) > 1]
    return any(re.search(".*".join(fixed), text) for text in said())


def test_there_are_some():
    assert len(MESSAGES) >= 25
    assert len(set(MESSAGES)) == len(MESSAGES)
    for area in ("Data", "The store", "Versions", "Engines", "Memory and disk", "Network"):
        assert f"\n## {area}\n" in PAGE


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_one_of_ours(message):
    assert sum(len(part) for part in message.split("…")) > 14, "too little to be told by"
    assert is_said(message), f"{message!r}: no message of the code any more; correct docs/errors.md"


def test_a_message_that_is_gone_would_be_noticed():
    assert not is_said("…: no such file or directory")
    assert not is_said("…: has no version or alias …")


def test_the_kinds_of_failed_images_are_those_of_the_code():
    """The second argument of `DataError`, and what the reader and the evaluation add."""
    section = PAGE.split("## Images that failed", 1)[1].split("## Data", 1)[0]
    named = {kind for row in re.findall(r"^\| (`.+?`) \|", section, re.M) for kind in re.findall(r"`([^`]+)`", row)}
    texts = set(said())
    assert len(named) >= 8
    assert named <= texts
    made = {
        node.args[1].value
        for package in ("models", "pipelines", "scoring")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "DataError"
        if len(node.args) == 2 and isinstance(node.args[1], ast.Constant)
    }
    assert made <= named, made - named


def test_the_exit_codes_are_those_of_the_code():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.M)}
    constants = {value for name, value in vars(reporting).items() if name.isupper() and isinstance(value, int)}
    assert codes == {0, 1} | constants
    # Nobody ends with a number of his own.
    allowed = {"reporting.py"}
    for package in ("pipelines", "scoring"):
        for path in (ROOT / package).rglob("*.py"):
            numbers = set(re.findall(r"(?:SystemExit|sys\.exit|\bend)\((\d+)", path.read_text()))
            assert path.name in allowed or numbers <= {"1"}, path
