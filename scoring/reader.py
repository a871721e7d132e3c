"""Samples to decoded images; an unreadable image becomes a Failure, never an exception."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool

import numpy as np

from models.errors import DataError, PlanesError, one_line
from models.images.decoding import read_image
from models.images.windows import AnyImage, open_image
from models.runtime.timing import timed
from pipelines.data.dataset import Sample

# Decoded images that wait for the model take no more than this, one image aside.
MOST_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Failure:
    """An image that could not be scored; ``kind`` in a word or two, for counting."""

    image_id: str
    path: str
    kind: str
    message: str


def read_ahead(
    samples: Iterable[Sample], ahead: int = 2, windows: bool = False, workers: int = 1
) -> Iterator[tuple[Sample, AnyImage | Failure]]:
    """Decode the images in order, up to ``ahead`` of them in threads while the model works.

    With ``windows`` files too large for memory are opened only; without they are failures.
    """
    # Threads that the process does not wait for when it ends: one may hang on a server that does not answer.
    pool = ThreadPool(workers)
    pending: deque[tuple[Sample, AsyncResult[AnyImage | Failure]]] = deque()
    try:
        for sample in samples:
            pending.append((sample, pool.apply_async(_read, (sample, windows))))
            while len(pending) > ahead or (pending and sum(_bytes(f) for _, f in pending) > MOST_BYTES):
                first, result = pending.popleft()
                yield first, result.get()
        while pending:
            first, result = pending.popleft()
            yield first, result.get()
    finally:
        pool.terminate()


def size_in_bytes(image: object) -> int:
    """Memory that a decoded image takes; 0 for one that is read by windows."""
    return image.nbytes if isinstance(image, np.ndarray) else 0


def _bytes(result: AsyncResult[AnyImage | Failure]) -> int:
    return size_in_bytes(result.get()) if result.ready() else 0


@timed("decode")
def _read(sample: Sample, windows: bool) -> AnyImage | Failure:
    try:
        return sample.part_of(
            open_image(sample.path, sample.rendering) if windows else read_image(sample.path, sample.rendering)
        )
    except PlanesError as error:
        kind = error.kind if isinstance(error, DataError) else "unusable"
        return failure(sample, kind, one_line(error))
    except MemoryError:
        return failure(sample, "too large", f"{sample.path}: does not fit in memory")
    except Exception as error:
        # A decoder may raise anything on a damaged file; one file must not end the job.
        what = f"{type(error).__name__}: {one_line(error, 160)}"
        return failure(sample, "damaged", f"{sample.path}: cannot be decoded ({what})")


def failure(sample: Sample, kind: str, message: str) -> Failure:
    """The row of the table of errors for an image."""
    return Failure(sample.image_id, str(sample.path), kind, message)
