"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written to it takes the place of ``path`` when all went well.

    Args:
        shared: other processes may write the same file at once, so that each needs a temporary one of its own;
            else its name is fixed, and what a kill left is written over.
        durable: flush it to disk before, and the folder afterwards: a power cut must not leave an empty file.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared:
        number, name = tempfile.mkstemp(prefix=f".{path.name[:100]}-", suffix=".tmp", dir=path.parent)
        os.close(number)
        # mkstemp lets nobody else read; folders are shared.
        os.chmod(name, 0o644)
        temporary = Path(name)
    else:
        temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, path)
        if durable:
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file that several processes may write at once; see `replacing`, durable.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    with replacing(path, shared=True, durable=True) as temporary, open(temporary, "wb") as handle:
        write(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """`write_whole` of what is at hand.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    write_whole(path, lambda handle: handle.write(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; see `replacing`.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def quoted_name(name: str) -> str:
    """A name without slashes, another one for each name.

    >>> quoted_name("a/b"), quoted_name("a%2Fb"), quoted_name("a b")
    ('a%2Fb', 'a%252Fb', 'a b')
    """
    return name.replace("%", "%25").replace("/", "%2F")


def clear_temporaries(folder: Path) -> None:
    """Remove what a process that was killed while writing left in a folder that is held."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*.tmp")):
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
