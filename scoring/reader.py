"""Samples to decoded images; what cannot be read becomes a Failure, never an exception."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from models.errors import PlanesError, one_line
from models.image import read_image
from models.windows import AnyImage, open_image
from pipelines.data.dataset import Dataset, Sample


@dataclass(frozen=True)
class Failure:
    """An image that could not be scored."""

    image_id: str
    path: str
    message: str


def read_ahead(dataset: Dataset, ahead: int = 2, windows: bool = False) -> Iterator[tuple[Sample, AnyImage | Failure]]:
    """Decode the images in order, ``ahead`` of them in a thread while the model works.

    With ``windows`` files too large for memory are opened only; without they are failures.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = []
        samples = iter(dataset.samples)
        for sample in samples:
            pending.append((sample, pool.submit(_read, sample, windows)))
            if len(pending) > ahead:
                first, future = pending.pop(0)
                yield first, future.result()
        for sample, future in pending:
            yield sample, future.result()


def _read(sample: Sample, windows: bool) -> AnyImage | Failure:
    try:
        image = open_image(sample.path) if windows else read_image(sample.path)
        # Without ground truth nothing depends on the size that was noted beforehand.
        return sample.part_of(image) if sample.truth else image
    except PlanesError as error:
        return Failure(sample.image_id, str(sample.path), one_line(error))
    except MemoryError:
        return Failure(sample.image_id, str(sample.path), "does not fit in memory")
