"""What this machine's CPU can compute in."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """Names of the CPU's instruction sets as Linux has them (``amx_bf16``, ``avx512_bf16``); empty elsewhere."""
    try:
        lines = CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself (Intel AMX, or AVX-512 BF16 of Intel and AMD)."""
    return bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def cpu_threads() -> int:
    """Threads that a network may take: ``OMP_NUM_THREADS``, else one for each CPU that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdecimal() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
