"""The files that a saved folder may hold: these names, of these sizes, and nothing that leads out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from models.errors import ModelError

SPEC_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"
# Of a twin, in place of the weights: an OpenVINO network.
NETWORK_FILE, NETWORK_WEIGHTS_FILE = "network.xml", "network.bin"
COMPONENTS = ("detector", "segmenter")
MAX_BYTES = {
    SPEC_FILE: 1_000_000,
    WEIGHTS_FILE: 8 * 1024**3,
    NETWORK_FILE: 100_000_000,
    NETWORK_WEIGHTS_FILE: 8 * 1024**3,
}


def check_names(files: Iterable[tuple[str, int]], where: object) -> None:
    """Check (path relative to the saved folder, bytes) pairs, before anything of them is fetched or read.

    Raises:
        ModelError: an absolute path, one with ``..``, a file that no saved model has (a
            pickle, say), or one that is larger than its kind can be.
    """
    for name, size in files:
        *folders, file = name.split("/")
        if name.startswith("/") or ".." in folders or file == ".." or re.search(r"[\\\x00-\x1f]", name):
            raise ModelError(f"{where}: holds a path that leads out of it ({name!r:.100}); do not use it")
        if file not in MAX_BYTES or len(folders) > 1 or (folders and folders[0] not in COMPONENTS):
            raise ModelError(f"{where}: holds {name!r:.100}, which no saved model has; do not use it")
        if size > MAX_BYTES[file]:
            raise ModelError(f"{where}: {name} has {size:,} bytes, more than {MAX_BYTES[file]:,}; do not use it")


def check_folder(folder: str | Path) -> None:
    """Check a local saved folder: see `check_names`; links are refused.

    Raises:
        ModelError: as there, or a link.
    """
    check_names(_walk(Path(folder), Path(folder)), folder)


def _walk(folder: Path, root: Path) -> Iterable[tuple[str, int]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = Path(entry.path).relative_to(root).as_posix()
            if entry.is_symlink():
                raise ModelError(f"{root}: {name} is a link; a saved model holds its files itself; do not use it")
            if entry.is_dir():
                yield from _walk(Path(entry.path), root)
            elif entry.is_file():
                yield name, entry.stat().st_size
            else:
                raise ModelError(f"{root}: {name} is no plain file; do not use it")
