"""Where a job in parts lies: a folder of this machine, of a disk that machines share, or of an object store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from models.errors import OutputError, PlanesError, one_line
from pipelines.data.remote import AnyPath, to_path
from pipelines.files import replacing, write_bytes


class Place:
    """Files by name (``folder/file``), each there whole or not at all, whoever writes it.

    Attributes:
        path: of the job's folder.
        local: its path in this machine's file system; None for an object store.
    """

    def __init__(self, path: AnyPath | str) -> None:
        self.path = to_path(path) if isinstance(path, str) else path
        self.local = self.path if isinstance(self.path, Path) else None

    def __str__(self) -> str:
        return str(self.path)

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted; none where it does not exist.

        Raises:
            OutputError: the store cannot be reached.
        """
        with self._reached():
            if self.local is not None:
                inside = self.local / folder
                return sorted(entry.name for entry in os.scandir(inside) if entry.is_file()) if inside.is_dir() else []
            try:
                entries = self._fs.ls(self._key(folder), detail=True, refresh=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            except TypeError:
                # Not every file system remembers what it has listed.
                entries = self._fs.ls(self._key(folder), detail=True)
        return sorted(e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file")

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in one, sorted; none where it does not exist.

        Raises:
            OutputError: the store cannot be reached.
        """
        with self._reached():
            if self.local is not None:
                inside = self.local / folder
                return sorted(entry.name for entry in os.scandir(inside) if entry.is_dir()) if inside.is_dir() else []
            try:
                entries = self._fs.ls(self._key(folder).rstrip("/"), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: there is none.
            OutputError: the store cannot be reached.
        """
        with self._reached():
            try:
                return (self.local / name).read_bytes() if self.local else bytes(self._fs.cat_file(self._key(name)))
            except (FileNotFoundError, NotADirectoryError):
                missing = f"{self}/{name}"
        raise FileNotFoundError(missing)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, in place of an earlier one.

        Raises:
            OutputError: it cannot be written.
        """
        with self._reached():
            if self.local is not None:
                write_bytes(self.local / name, content)
            else:
                self._fs.pipe_file(self._key(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that does not exist yet; False where it does, in an object store also when two do so at once.

        Raises:
            OutputError: it cannot be written.
        """
        with self._reached():
            if self.local is not None:
                if (self.local / name).exists():
                    return False
                write_bytes(self.local / name, content)
                return True
            try:
                self._fs.pipe_file(self._key(name), content, mode="create")
            except FileExistsError:
                return False
            return True

    def publish(self, name: str, file: Path) -> None:
        """Put a file of this machine there, in place of an earlier one; the file itself stays.

        Raises:
            OutputError: it cannot be written.
        """
        with self._reached():
            if self.local is None:
                self._fs.put_file(str(file), self._key(name))
                return
            with replacing(self.local / name, shared=True, durable=True) as temporary:
                shutil.copyfile(file, temporary)

    def remove(self, folder: str, names: Sequence[str]) -> None:
        """Remove files of a folder, "" for this one, as far as they are there, and folders in which nothing else is.

        Raises:
            OutputError: one cannot be removed.
        """
        with self._reached():
            if self.local is None:
                there = [self._key(f"{folder}/{name}".lstrip("/")) for name in set(names) & set(self.names(folder))]
                if there:
                    self._fs.rm(there)
                return
            inside = self.local / folder
            for name in names:
                (inside / name).unlink(missing_ok=True)
            self.sweep(folder)
            while inside != self.local and inside.is_dir() and not inside.is_symlink() and not any(inside.iterdir()):
                inside.rmdir()
                inside = inside.parent

    def sweep(self, folder: str) -> None:
        """Remove what processes that were killed while they published have left in a folder of this machine."""
        for path in (self.local / folder).glob(".part-*.tmp") if self.local is not None else ():
            path.unlink(missing_ok=True)

    @property
    def _fs(self):  # type: ignore[no-untyped-def]
        assert not isinstance(self.path, Path)
        return self.path.fs

    def _key(self, name: str) -> str:
        assert not isinstance(self.path, Path)
        return f"{self.path.path.rstrip('/')}/{name}"

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except PlanesError:
            raise
        except OSError as error:
            why = error.strerror or one_line(error, 160)
            raise OutputError(f"{self}: cannot be used ({why}); what is done is kept, call again") from error
        except Exception as error:
            if self.local is not None:
                raise
            # botocore's and aiohttp's errors have no common kind.
            raise OutputError(
                f"{self}: the store does not answer ({one_line(error, 160)}); what is done is kept, call again"
            ) from error
