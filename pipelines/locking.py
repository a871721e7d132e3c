"""Folders that one process at a time works in, and files that appear whole or not at all."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        what: is being done, such as "training planes-det"; reported to a command that finds it held.
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
        raise OutputError(
            f"{path.parent / _name(path)}: held by {_holder(path)}; wait for it or stop it, "
            "or give another --name or --work-dir"
        ) from error
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
