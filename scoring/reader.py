"""Samples to decoded images; what cannot be read becomes a Failure, never an exception."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from models.errors import PlanesError, one_line
from models.image import read_image
from pipelines.data.dataset import Dataset, Sample


@dataclass(frozen=True)
class Failure:
    """An image that could not be scored."""

    image_id: str
    path: str
    message: str


def read_ahead(dataset: Dataset, ahead: int = 2) -> Iterator[tuple[Sample, np.ndarray | Failure]]:
    """Decode the images in order, ``ahead`` of them in a thread while the model works."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = []
        samples = iter(dataset.samples)
        for sample in samples:
            pending.append((sample, pool.submit(_read, sample)))
            if len(pending) > ahead:
                first, future = pending.pop(0)
                yield first, future.result()
        for sample, future in pending:
            yield sample, future.result()


def _read(sample: Sample) -> np.ndarray | Failure:
    try:
        # Without ground truth nothing depends on the size that was noted beforehand.
        return sample.read() if sample.truth else read_image(sample.path)
    except PlanesError as error:
        return Failure(sample.image_id, str(sample.path), one_line(error))
    except MemoryError:
        return Failure(sample.image_id, str(sample.path), "does not fit in memory")
