"""The code of the pages: blocks, the commands in them, and what is marked as not run.

A block is run unless a comment above it, which no reader of the rendered page sees, says why not:

    <!-- not run: needs a cluster -->
    <!-- not run (pip install): the suite installs nothing -->

The second form leaves out the commands of the block that begin with these words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

COMMANDS, PYTHON = "", "python"
# What is read by a library, and what is only shown.
READ = ("yaml", "ini")
SHOWN = ("text", "mermaid", "{toctree}", "{eval-rst}")
# First words of commands that the tests know how to run.
RUN = re.compile(
    r"(score|planes|planes-registry) |python -m (pipelines\.steps\.\w+|scoring\.\w+)\b|make demo$|base64 "
    r"|mlflow (run|ui|models serve|models predict) "
)

_MARK = re.compile(r"<!-- not run(?: \((?P<words>[^)]+)\))?:(?P<reason>.*)-->")


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        page: the page's path.
        line: of the fence, from 1.
        language: what stands behind the fence.
        text: between the fences.
        marks: (words, reason) of each mark above it; without words the whole block is meant.
    """

    page: Path
    line: int
    language: str
    text: str
    marks: tuple[tuple[str, str], ...] = ()

    @property
    def place(self) -> str:
        """Page and line, as an editor opens them."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its commands, each in one line and without its comment."""
        if self.language != COMMANDS:
            return []
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s+)#.*$", "", line).strip())]

    def why_not(self, command: str = "") -> str:
        """Why the command, or the block, is not run; empty where it is."""
        return next((reason for words, reason in self.marks if command.startswith(words)), "")

    def faults(self) -> list[str]:
        """What the tests would pass over without a word."""
        found = []
        if self.language not in (COMMANDS, PYTHON, *READ, *SHOWN):
            found.append(f"language {self.language!r}: write commands without one, and what is no code as text")
        for words, reason in self.marks:
            if len(reason.split()) < 3:
                found.append(f"a mark without a reason: {reason!r}")
            if words and not any(command.startswith(words) for command in self.commands):
                found.append(f"the mark ({words}) is of no command here")
        found += [
            f"{command}: neither run nor marked; see tests/pages/blocks.py"
            for command in self.commands
            if not self.why_not(command) and not RUN.match(command)
        ]
        return [f"{self.place}: {one}" for one in found]


def read_blocks(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of a page in their order."""
    found, marks, opened = [], [], None
    inside: list[str] = []
    for number, line in enumerate((page.read_text() if text is None else text).splitlines(), start=1):
        if opened is None and line.startswith("```"):
            opened, inside = (number, line[3:].strip()), []
        elif opened is not None and line.strip() == "```":
            found.append(Block(page, *opened, "\n".join(inside) + "\n", tuple(marks)))
            opened, marks = None, []
        elif opened is not None:
            inside.append(line)
        elif mark := _MARK.fullmatch(line.strip()):
            marks.append((mark["words"] or "", mark["reason"].strip()))
        elif line.strip():
            marks = []
    return found
