"""Seconds spent by operation, added up over this process and its threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_seconds: defaultdict[str, float] = defaultdict(float)


@contextmanager
def timed(operation: str) -> Iterator[None]:
    """Add the time spent inside to ``operation``; serves as a decorator too.

    Operations that run beside each other in several threads may add up to more than the time that passed.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        with _lock:
            _seconds[operation] += time.perf_counter() - started


def seconds_since(before: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds of each operation, less those that an earlier call returned."""
    with _lock:
        now = dict(_seconds)
    return {operation: value - (before or {}).get(operation, 0.0) for operation, value in now.items()}
