"""Where this machine keeps what can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_base() -> Path:
    """``PLANES_CACHE``, or ``planes`` in the user's cache folder."""
    given = os.environ.get("PLANES_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planes"
