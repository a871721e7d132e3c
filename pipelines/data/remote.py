"""Files that are elsewhere: URLs of object stores and web servers, through fsspec."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from models.errors import DataError, one_line
from models.images import decoding
from models.images.decoding import IMAGE_SUFFIXES
from models.images.remote_bytes import CONTENT_MARKS, TIMES

if TYPE_CHECKING:
    from upath import UPath

# Either this machine's path, or universal_pathlib's UPath: the same methods over a URL.
AnyPath: TypeAlias = "Path | UPath"

# Questions to a store that are open at a time.
ASKING = 16
# Seconds in which a web server must take a connection, and after which one that says nothing is given up.
CONNECT, SILENCE = 30, 60
# Failures in a row after which a store is taken for down, and requested no more than once for each file.
MOST_FAILURES = 3 * ASKING
# The mark of a file of which nothing is known; it says nothing about whether the file has changed.
UNREADABLE = "unreadable"


def is_url(where: str | os.PathLike) -> bool:
    """Whether a place is named as ``protocol://...``."""
    return "://" in str(where)


def to_path(where: str | os.PathLike) -> AnyPath:
    """A path of this machine, or a ``UPath`` for a URL (``file://`` is this machine too).

    Raises:
        DataError: no such protocol, or its library is not installed.
    """
    text = str(where)
    if not is_url(text):
        return Path(text)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    from upath import UPath

    try:
        path = UPath(text, **(_limits() if text.startswith(("http://", "https://")) else {}))
        # Made on first use; only then does a missing library show.
        _ = path.fs
    except (ImportError, ValueError) as error:
        raise DataError(f"{text}: cannot be opened ({one_line(error, 160)})") from error
    return path


def _limits() -> dict[str, Any]:
    """How long a web server may keep silent, unless fsspec's own settings say otherwise; a large file may take its time."""
    import aiohttp
    from fsspec.config import conf

    if "client_kwargs" in conf.get("http", {}):
        return {}
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)}}


def absolute(path: AnyPath) -> str:
    """A path or URL as a text that means the same from any working folder."""
    return os.path.abspath(path) if isinstance(path, Path) else str(path)


def list_remote(path: UPath) -> list[UPath]:
    """The image files of a URL: itself, those directly in a folder, or those that a glob matches; sorted.

    Raises:
        DataError: nothing there, the store cannot be reached, or does not let us look.
    """
    from upath import UPath

    text, fs = str(path), path.fs
    try:
        if any(sign in path.path for sign in "*["):
            names = fs.glob(path.path)
        else:
            names = [path.path] if fs.isfile(path.path) else _files_in(fs, path.path)
    except FileNotFoundError as error:
        raise DataError(f"{text}: no such file or folder") from error
    except Exception as error:
        # Each store's library has errors of its own.
        raise DataError(f"{text}: cannot be listed ({one_line(error, 200)})") from error
    chosen = sorted(name for name in names if name == path.path or name.lower().endswith(IMAGE_SUFFIXES))
    return [UPath(fs.unstrip_protocol(name), **path.storage_options) for name in chosen]


def _files_in(fs: Any, folder: str) -> list[str]:
    return [entry["name"] for entry in fs.ls(folder, detail=True) if entry["type"] == "file"]


def fingerprints(paths: Sequence[AnyPath]) -> list[str]:
    """Fingerprint files without reading them: size and time of change, or the store's mark of the content.

    UNREADABLE where a file has none: whoever reads the file reports what is wrong with it.
    A store that does not answer is tried again, until it has failed so often that it counts as down.
    """
    local = [path for path in paths if isinstance(path, Path)]
    if len(local) == len(paths):
        return [_local_mark(path) for path in local]
    store = _Patience()
    # Unlike an executor's, its threads are not waited for where Ctrl-C ends the command.
    with ThreadPool(ASKING) as pool:
        return pool.map(store.mark, paths)


def _local_mark(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:
        return UNREADABLE
    return f"{state.st_size} {state.st_mtime_ns}"


class _Patience:
    """Requests fingerprints from a store, again where it does not answer, but not for ever: files may be millions."""

    def __init__(self) -> None:
        self._failed = 0

    def mark(self, path: AnyPath) -> str:
        """The mark of one file."""
        if isinstance(path, Path):
            return _local_mark(path)
        for pause in (*decoding.RETRIES, None):
            try:
                mark = _remote_mark(path)
                self._failed = 0
                return mark
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
                return UNREADABLE
            except Exception:
                # Each store's library has errors of its own.
                self._failed += 1
                if pause is None or self._failed > MOST_FAILURES:
                    return UNREADABLE
            time.sleep(pause)
        raise AssertionError


def _remote_mark(path: UPath) -> str:
    info = path.fs.info(path.path)
    return mark_of_entry(info.get("size"), info)


def mark_of_entry(size: int | None, info: Mapping[str, Any]) -> str:
    """The fingerprint of a remote file of which a store has told the size and more.

    >>> mark_of_entry(12, {"ETag": "ab", "LastModified": "today"})
    '12 ab'
    """
    known = [str(info[key]) for key in CONTENT_MARKS if info.get(key)]
    times = [str(info[key]) for key in TIMES if info.get(key)]
    # The first that is there counts.
    return " ".join([str(size), *(known or times)[:1]])
