"""Compiled networks on disk: kept for the next start, checked before they are used, removed when nobody does."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path

from models.runtime.cache import cache_base

KEPT_DAYS = 30
BLOB, DIGEST = ".blob", ".sha256"
# Held while a network is compiled.
LOCK = ".lock"


def compiled_folder() -> Path:
    """Where compiled networks are kept: ``compiled`` in ``PLANES_CACHE``, or in ``planes`` of the user's cache folder."""
    return cache_base() / "compiled"


def open_cache(key: str) -> Path | None:
    """The folder of one network's compiled forms, without those that are not what was written.

    OpenVINO notices a file that is cut, not one whose middle was lost: it computes something else. What nobody used
    for `KEPT_DAYS` is removed beside it.

    Returns:
        The folder; None where nothing can be kept, so that the network is compiled each time.
    """
    folder = compiled_folder() / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        for blob in folder.glob(f"*{BLOB}"):
            if _read_note(blob) != _digest(blob):
                blob.unlink(missing_ok=True)
                blob.with_suffix(DIGEST).unlink(missing_ok=True)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        for other in compiled_folder().iterdir():
            if other.is_dir() and time.time() - other.stat().st_mtime > KEPT_DAYS * 86_400:
                shutil.rmtree(other, ignore_errors=True)
    return folder if os.access(folder, os.W_OK) else None


def note_digests(folder: Path) -> None:
    """After a network was compiled: note what was written, so that `open_cache` knows it again."""
    with contextlib.suppress(OSError):
        for blob in folder.glob(f"*{BLOB}"):
            note = blob.with_suffix(DIGEST)
            if not note.exists():
                # Half a note, or that of another process's form of it, costs one more compilation.
                note.write_text(_digest(blob))


def _read_note(blob: Path) -> str | None:
    note = blob.with_suffix(DIGEST)
    return note.read_text() if note.exists() else None


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
