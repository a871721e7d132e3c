"""Folders that one process at a time works in, and files that appear whole or not at all."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from models.errors import OutputError, one_line


def lock_of(folder: Path) -> Path:
    """The lock of a folder: beside it, so that the folder can be removed while it is held."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def held(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; it says who holds it, and goes with its process, however that ends.

    Args:
        what: is being done, such as "training planes-det"; told to whom finds it held.
        wait: until it is free, saying so, instead of an error.

    Raises:
        OutputError: another process holds it (saying which), or the lock cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            logging.getLogger(__name__).warning("%s: waiting for %s", path.parent / _name(path), _holder(path))
            lock.acquire()
        path.write_text(f"{what} (process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')})")
    except Timeout as error:
        remedy = "wait for it or stop it, or give another --name or --work-dir"
        raise OutputError(f"{path.parent / _name(path)}: held by {_holder(path)}; {remedy}") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be locked ({one_line(error, 160)})") from error
    try:
        yield
    finally:
        lock.release()


def _name(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".lock")


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "another process"
    except OSError:
        return "another process"


def write_bytes(path: Path, content: bytes) -> None:
    """`write_whole` of what is at hand.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    write_whole(path, lambda handle: handle.write(content))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file of its own, flush it to disk and rename it over ``path``.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name[:100]}-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp lets nobody else read; folders are shared.
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def clear_temporaries(folder: Path) -> None:
    """Remove what a process that was killed while writing left in a folder that is held."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*.tmp")):
        path.unlink(missing_ok=True)
