"""Images that turn out unreadable while a training runs: left out from then on, each reported once, none ends it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.errors import DataError, PlanesError, one_line
from pipelines.data.dataset import Sample

UNREADABLE_FILE = "unreadable.jsonl"


class Unreadable:
    """The unreadable images of one training, tiles of a file each by itself.

    Args:
        folder: of the training: noted in a file there, what one process finds is known to all that load
            batches, and to a resumed run. None keeps it in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = None if folder is None else folder / UNREADABLE_FILE
        # (path, window of it that an image is) -> what is wrong.
        self._known: dict[tuple[str, str], str] = {}
        self.messages()

    def messages(self) -> dict[str, str]:
        """Path of the file -> problem, of all processes so far."""
        lines = self._file.read_bytes().splitlines() if self._file and self._file.exists() else []
        for line in lines:
            try:
                path, window, what = json.loads(line)
                self._known.setdefault((path, window), what)
            except ValueError:
                # Cut by a kill; whoever meets the image again notes it again.
                continue
        return {path: what for (path, _), what in self._known.items()}

    def __contains__(self, sample: Sample) -> bool:
        return _key(sample) in self._known

    def add(self, sample: Sample, error: Exception, consequence: str = "left out of the training") -> None:
        """Note an image that cannot be read; report it and its consequence, once for each file."""
        reported, path, key = self.messages(), str(sample.path), _key(sample)
        if key in self._known:
            return
        what = one_line(error) if isinstance(error, PlanesError) else f"{type(error).__name__}: {one_line(error, 160)}"
        self._known[key] = what if path in what else f"{path}: cannot be read ({what})"
        if path not in reported:
            logging.getLogger(__name__).warning("%s; %s", self._known[key], consequence)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # One write of one line, begun with a line break: several processes, and one that was killed, leave whole lines.
            with open(self._file, "ab", buffering=0) as handle:
                handle.write(b"\n" + json.dumps([*key, self._known[key]]).encode() + b"\n")

    def first_readable(
        self, item: int, count: int, sample_of: Callable[[int], Sample], read: Callable[[Sample], np.ndarray]
    ) -> tuple[int, np.ndarray]:
        """An item of a data set, or the next one after it whose image can be read, and its image.

        Which one that is depends on nothing but the files, so that a resumed run sees the same batches.

        Args:
            item: 0 to ``count`` - 1; after the last one comes the first.

        Raises:
            DataError: none can be read.
        """
        for place in range(item, item + count):
            sample = sample_of(place % count)
            if sample in self:
                continue
            try:
                return place % count, read(sample)
            except Exception as error:
                raise_passing(error, sample)
                # A decoder may raise anything on a damaged file.
                self.add(sample, error)
        raise DataError(f"none of the training images can be read; the first: {next(iter(self._known.values()))}")


def raise_passing(error: Exception, sample: Sample) -> None:
    """Raise errors that may be over when the training is called again: a disk or store that is away, memory that is full.

    Raises:
        DataError: such an error.
    """
    passing = isinstance(error, DataError) and error.kind in ("missing", "unreachable", "permission denied")
    if passing:
        raise error
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        what = f"{type(error).__name__}: {one_line(error, 160)}"
        raise DataError(f"{sample.path}: cannot be read now ({what}); the same command goes on", "unreachable") from error


def _key(sample: Sample) -> tuple[str, str]:
    # Of a file that is read by windows one tile may be damaged alone; what is left out of a batch must not depend on
    # which tile was met first.
    return str(sample.path), "" if sample.window is None else ",".join(map(str, sample.window))
