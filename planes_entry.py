"""Where the console commands begin: nothing of ours is imported before it is seen to be ours.

``models``, ``pipelines`` and ``scoring`` are common names. A folder of such a name that comes first on Python's path would
be imported instead, and end in an error that says nothing. This module's own name is ours alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("models", "pipelines", "scoring")
COMMANDS = {"score": "scoring.cli", "planes": "scoring.planes", "planes_registry": "pipelines.steps.registry_cli"}


def foreign_package(root: Path) -> str:
    """The first of our packages that Python would import from elsewhere than ``root``, as an error; empty: none."""
    for name in PACKAGES:
        ours = root / name
        spec = find_spec(name)
        places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
        if not places or Path(str(places[0])).resolve() != ours.resolve():
            found = places[0] if places else "nothing"
            remedy = "rename the other one, or take its folder out of PYTHONPATH"
            return f"package {name}: Python imports {found} instead of {ours}; {remedy}"
    return ""


def __getattr__(name: str) -> Any:
    """The command of this name, imported when a console script asks for it."""
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    fault = foreign_package(Path(__file__).parent)
    if fault:
        sys.exit(f"Error: {fault}")
    return import_module(COMMANDS[name]).main
