"""Samples to decoded images; what cannot be read becomes a Failure, never an exception."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from models.errors import DataError, PlanesError, one_line
from models.image import read_image
from models.windows import AnyImage, open_image
from pipelines.data.dataset import Sample


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
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending: deque[tuple[Sample, Future[AnyImage | Failure]]] = deque()
        try:
            for sample in samples:
                pending.append((sample, pool.submit(_read, sample, windows)))
                if len(pending) > ahead:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _read(sample: Sample, windows: bool) -> AnyImage | Failure:
    try:
        image = open_image(sample.path) if windows else read_image(sample.path)
        # Without ground truth nothing depends on the size that was noted beforehand.
        return sample.part_of(image) if sample.truth else image
    except PlanesError as error:
        kind = error.kind if isinstance(error, DataError) else "unusable"
        return Failure(sample.image_id, str(sample.path), kind, one_line(error))
    except MemoryError:
        return Failure(sample.image_id, str(sample.path), "too large", f"{sample.path}: does not fit in memory")
    except Exception as error:
        # A decoder may raise anything on a damaged file; one file must not end the job.
        what = f"{type(error).__name__}: {one_line(error)[:160]}"
        return Failure(sample.image_id, str(sample.path), "damaged", f"{sample.path}: cannot be decoded ({what})")
