"""A file that is elsewhere, of which only the parts that are read are fetched, each once."""

from __future__ import annotations

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
        self.size = int(self._asked(lambda: source.fs.info(source.path)).get("size") or 0)
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
        try:
            self._fetch(start, end)
            return os.pread(self._kept, end - start, start)
        except OSError as error:
            self.error = f"{self.source}: its parts cannot be kept in {tempfile.gettempdir()} ({one_line(error)})"
            raise DataError(self.error, "unreachable") from error

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
            os.pwrite(self._kept, content, first * BLOCK)
            self._blocks.update(range(first, last + 1))
            if len(content) == self.size:
                break

    def _part(self, start: int, end: int) -> bytes:
        content = self._asked(lambda: self.source.fs.cat_file(self.source.path, start=start, end=end))
        if len(content) not in (end - start, self.size):
            self.error = f"{self.source}: its server sends {len(content)} bytes where {end - start} were asked for"
            raise DataError(self.error, "unreachable")
        return bytes(content)

    def _asked(self, request: Callable[[], Any]) -> Any:
        for pause in (*RETRIES, None):
            try:
                return request()
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
                raise
            except Exception as error:
                # Each store's library has errors of its own.
                if pause is None:
                    self.error = f"{self.source}: cannot be fetched ({one_line(error, 160)})"
                    raise DataError(self.error, "unreachable") from error
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
        except DataError:
            if not self._quiet:
                raise
            content = b""
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
