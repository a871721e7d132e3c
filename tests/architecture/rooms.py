"""The rooms of the code and who imports whom; run as a program it draws them into docs/architecture.md."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("models", "pipelines", "scoring")
# Rooms within a room that are drawn on their own.
WITHIN = "pipelines.data"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module, packages under their own name."""
    files = [p for package in PACKAGES for p in sorted((root / package).rglob("*.py"))]
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports: anywhere in the file, for types alone, and by a string."""
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        if path.name == "__init__.py":
            continue
        found = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{a.name}" for a in node.names]
                found.update(n if n in known else node.module for n in names)
            elif isinstance(node, ast.Import):
                found.update(a.name for a in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                found.add(node.value.split(":")[0])
        # A package is no more than its docstring.
        found &= {n for n, p in known.items() if p.name != "__init__.py"} - {name}
    return graph


def room_of(name: str) -> str:
    """The room that a module lies in: the folder below the package, or the module itself."""
    parts = name.split(".")
    deep = 3 if name.startswith(f"{WITHIN}.") else 2
    return ".".join(parts[:deep])


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room -> rooms that it imports."""
    result: dict[str, set[str]] = {}
    for name, found in graph.items():
        result.setdefault(room_of(name), set()).update(room_of(f) for f in found)
    return {room: found - {room} for room, found in result.items()}


def order(graph: dict[str, set[str]]) -> list[str]:
    """From the bottom up.

    Raises:
        graphlib.CycleError: there is a circle.
    """
    return list(TopologicalSorter(graph).static_order())


def drawing(graph: dict[str, set[str]]) -> str:
    """A Mermaid flow chart of the rooms of each package, without the arrows that others imply."""
    below: dict[str, set[str]] = {}
    for room in order(graph):
        below[room] = set().union(*({f} | below[f] for f in graph.get(room, ())))
    lines = ["flowchart TD"]
    for package in reversed(PACKAGES):
        lines.append(f"  subgraph {package}")
        inside = sorted(r for r in graph if r.startswith(f"{package}."))
        lines += [f'    {r}["{r.removeprefix(package + ".")}"]' for r in inside]
        lines.append("  end")
    for room in sorted(graph):
        implied = set().union(*(below[f] for f in graph[room])) if graph[room] else set()
        # Between packages one arrow is enough, drawn below.
        same = {f for f in graph[room] - implied if f.split(".")[0] == room.split(".")[0]}
        lines += [f"  {room} --> {f}" for f in sorted(same)]
    return "\n".join([*lines, "  scoring --> pipelines --> models"])


def drawn(page: str, text: str) -> str:
    """The page with its drawing replaced."""
    return re.sub(r"```mermaid\n.*?```", lambda _: f"```mermaid\n{text}\n```", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(), drawing(rooms(imports(modules())))))
