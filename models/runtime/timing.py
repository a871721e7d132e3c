"""Where the time goes: seconds by stage, added up over this process and its threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_seconds: defaultdict[str, float] = defaultdict(float)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Add the time spent inside to ``stage``; serves as a decorator too.

    Stages that run beside each other in several threads may add up to more than the time that passed.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        with _lock:
            _seconds[stage] += time.perf_counter() - started


def seconds_since(before: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds of each stage, less those that an earlier call returned."""
    with _lock:
        now = dict(_seconds)
    return {stage: value - (before or {}).get(stage, 0.0) for stage, value in now.items()}
