"""A command starts and ends sooner: nobody looks for garbage while libraries are imported, or at the end."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def importing() -> Iterator[None]:
    """No garbage collection inside: imports leave none, and looking for it takes a fifth of their time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@cache
def prepare_command() -> None:
    """Once for a process that runs a command: no telemetry of MLflow unless the environment asks for it, and a short end.

    Telemetry waits for a server of MLflow's project. The last collection, over everything that
    was imported, takes up to a second; the process ends anyway.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    atexit.register(gc.freeze)
