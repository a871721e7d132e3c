"""A file that is elsewhere, of which only the parts that are read are fetched, each once."""

from __future__ import annotations

import errno
import inspect
import io
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from itertools import groupby
from typing import Any

from models.errors import DataError, one_line
from models.images.decoding import RETRIES, RemoteFile

# Bytes that are fetched at least; what is read once is kept in a temporary file without a name.
BLOCK = 65_536
# What stores call the mark of a content, and the time of the last change.
CONTENT_MARKS = ("ETag", "etag", "md5Hash", "content_md5")
TIMES = ("LastModified", "last_modified", "updated", "mtime", "created", "Last-Modified")
# Smaller files are fetched whole: one request instead of several.
WORTH_IT = 1_000_000


class RemoteBytes:
    """The bytes of a remote file; what is read takes temporary space until nobody knows it any more.

    Attributes:
        size: of the file in bytes.
        error: why a part could not be fetched; no further one can be read then.

    Raises:
        DataError: its store cannot be reached.
    """

    def __init__(self, source: RemoteFile) -> None:
        self.source, self.error = source, ""
        self.mark = self._mark()
        self.size = int(self.mark.get("size", 0))
        # Not fsspec's caches: they note a part as there before they have it, and a full disk under their mapped file
        # ends the process.
        number, name = tempfile.mkstemp(prefix="planes-")
        os.unlink(name)
        self._kept, self._blocks = number, set[int]()
        weakref.finalize(self, os.close, number)

    def stream(self, *, quiet: bool = False) -> io.BufferedReader:
        """A stream of them, from the start; a quiet one ends early where a part cannot be fetched, and `error` says why."""
        return io.BufferedReader(_Stream(self, quiet), BLOCK)

    def read(self, start: int, end: int) -> bytes:
        """Bytes from ``start`` to ``end``, which lies in the file.

        Raises:
            DataError: they cannot be fetched, now or when they were asked for before.
        """
        if self.error:
            raise DataError(self.error, "unreachable")
        self._fetch(start, end)
        content = os.pread(self._kept, end - start, start)
        if len(content) < end - start:
            raise self._failed(f"its parts are gone from {tempfile.gettempdir()}")
        return content

    def check(self) -> None:
        """Look whether the file is still the one whose parts were read.

        Raises:
            DataError: it is another one now, so that its parts may be those of two.
        """
        if self._mark(again=True) != self.mark:
            raise self._failed("has changed while it was read")

    def _failed(self, what: str) -> DataError:
        self.error = f"{self.source}: {what}"
        return DataError(self.error, "unreachable")

    def _mark(self, again: bool = False) -> dict[str, Any]:
        """What its store says of the file's content."""
        fs = self.source.fs
        # Stores that keep what they know of files (s3fs) are to look anew.
        keeps = "refresh" in inspect.signature(getattr(fs, "_info", fs.info)).parameters
        known = self._asked(lambda: fs.info(self.source.path, **({"refresh": True} if again and keeps else {})))
        return {name: str(known[name]) for name in ("size", *CONTENT_MARKS, *TIMES) if known.get(name)}

    def _fetch(self, start: int, end: int) -> None:
        """Have the bytes at hand: neighbouring blocks that are missing are one request."""
        missing = [i for i in range(start // BLOCK, -(-end // BLOCK)) if i not in self._blocks]
        runs = [list(run) for _, run in groupby(enumerate(missing), key=lambda pair: pair[1] - pair[0])]
        for run in runs:
            first, last = run[0][1], run[-1][1]
            content = self._part(first * BLOCK, min((last + 1) * BLOCK, self.size))
            if len(content) == self.size:
                # All of it, asked for or not: there are servers that know no parts.
                first, last = 0, -(-self.size // BLOCK) - 1
            self._keep(content, first * BLOCK)
            self._blocks.update(range(first, last + 1))
            if len(content) == self.size:
                break

    def _keep(self, content: bytes, start: int) -> None:
        try:
            written = os.pwrite(self._kept, content, start)
            # A disk that is nearly full takes what fits, and says no more than how much that was.
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._failed(f"its parts cannot be kept in {tempfile.gettempdir()} ({one_line(error)})") from error

    def _part(self, start: int, end: int) -> bytes:
        content = self._asked(lambda: self.source.fs.cat_file(self.source.path, start=start, end=end))
        if len(content) not in (end - start, self.size):
            raise self._failed(f"its server sends {len(content)} bytes where {end - start} were asked for")
        return bytes(content)

    def _asked(self, request: Callable[[], Any]) -> Any:
        for pause in (*RETRIES, None):
            try:
                return request()
            except (PermissionError, IsADirectoryError, NotADirectoryError):
                self.error = f"{self.source}: may not be read"
                raise
            except Exception as error:
                # Each store's library has errors of its own; that of web servers calls missing what does not answer, too.
                if pause is None and isinstance(error, FileNotFoundError):
                    self.error = f"{self.source}: is not, or not any more, on its server"
                    raise
                if pause is None:
                    raise self._failed(f"cannot be fetched ({one_line(error, 160)})") from error
            time.sleep(pause)
        raise AssertionError


class _Stream(io.RawIOBase):
    def __init__(self, content: RemoteBytes, quiet: bool) -> None:
        super().__init__()
        self._content, self._quiet, self._place = content, quiet, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._content.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._content.size, self._place + len(buffer))
        try:
            content = self._content.read(self._place, end) if end > self._place else b""
        except (DataError, OSError):
            if not self._quiet:
                raise
            content = b""
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
