"""Runs a job in this process: images decoded ahead, predicted in batches that never cross a shard."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Generator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from models.errors import one_line
from models.images.windows import AnyImage, fills_little
from models.instances import Instances
from models.predictor import Predictor
from models.runtime.devices import Precision, precision
from models.runtime.out_of_memory import predict_in_halves
from models.runtime.timing import seconds_since, timed
from models.tiling.predictor import tiling_of
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.inference import image_failure, is_segmenter, predict_image
from scoring.reader import MOST_BYTES, Failure, failure, read_ahead, size_in_bytes
from scoring.runners.runner import ShardResult

# Batches of images where none is given. On a CPU a batch is no gain in itself (models/tiling/predictor.py).
CPU_BATCH, GPU_BATCH = 1, 8
# Batches' worth of images of different sizes that wait for others of their size.
WAITING_BATCHES = 4


def auto_batch(device: str) -> int:
    """Images at a time where the user leaves it to us."""
    return CPU_BATCH if device == "cpu" else GPU_BATCH


def auto_workers(device: str, dataset: Dataset) -> int:
    """Threads that decode where the user gives no number: threads wait for remote images, and do no work meanwhile."""
    cores = os.cpu_count() or 1
    if any(not isinstance(s.path, Path) for s in dataset.samples[:1]):
        return 16
    return max(1, cores // 4) if device == "cpu" else min(16, cores)


def peak_memory() -> int:
    """Highest memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    # What getrusage says on Linux starts at the memory of the process that started this one.
    if status.exists() and (noted := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(noted[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Read(NamedTuple):
    """A decoded image and its place in the shard."""

    number: int
    sample: Sample
    image: AnyImage


class LocalRunner:
    """A predictor in this process."""

    def __init__(
        self,
        predictor: Predictor,
        device: str = "cpu",
        *,
        batch_size: int = 1,
        workers: int = 1,
        kind: Precision = "32",
    ) -> None:
        self.predictor, self.device = predictor, device
        self.batch_size, self.workers, self.kind = batch_size, workers, kind
        self._before = seconds_since()
        self._tiled = tiling_of(predictor) is not None
        self._little: dict[int, list[str]] = {}

    def timings(self) -> dict[str, float]:
        """See `Runner`."""
        return seconds_since(self._before)

    def peak_megabytes(self) -> dict[str, float]:
        """See `Runner`."""
        peaks = {"memory": peak_memory() / 1e6}
        if self.device != "cpu":
            import torch

            peaks["gpu_memory"] = torch.cuda.max_memory_allocated(self.device) / 1e6
        return peaks

    def little(self, position: int) -> list[str]:
        """See `Runner`."""
        return self._little.pop(position, [])

    def results(self, shards: Sequence[Sequence[Sample]]) -> Generator[ShardResult, None, None]:
        """See `Runner`. Images of one size share a batch; tiles of all images do.

        The images of a batch depend on nothing but its shard, so that a shard made again is the same.
        """
        ahead = max(2, self.batch_size, self.workers)
        images = read_ahead(chain.from_iterable(shards), ahead, self._tiled, self.workers)
        for position, shard in enumerate(shards):
            waiting: dict[Any, list[_Read]] = {}
            for index, sample in enumerate(shard):
                with timed("wait"):
                    _, image = next(images)
                if isinstance(image, Failure):
                    yield position, index, image
                    continue
                if fills_little(image):
                    self._little.setdefault(position, []).append(sample.image_id)
                size = None if self._tiled else image.shape
                waiting.setdefault(size, []).append(_Read(index, sample, image))
                if len(waiting[size]) < self.batch_size and not self._too_many(waiting):
                    continue
                fullest = max(waiting, key=lambda size: len(waiting[size]))
                yield from ((position, *one) for one in self._predict(waiting.pop(fullest)))
            for batch in waiting.values():
                yield from ((position, *one) for one in self._predict(batch))

    def _too_many(self, waiting: dict[Any, list[_Read]]) -> bool:
        held = [read.image for batch in waiting.values() for read in batch]
        return len(held) >= WAITING_BATCHES * self.batch_size or sum(map(size_in_bytes, held)) > MOST_BYTES

    def _predict(self, batch: list[_Read]) -> list[tuple[int, Instances | Failure]]:
        """Results of a batch; where it fails, of its images one by one, so that only those that fail are lost."""
        try:
            with precision(self.device, self.kind):
                if is_segmenter(self.predictor):
                    return [(r.number, predict_image(self.predictor, cast(np.ndarray, r.image), r.sample)) for r in batch]
                # Images that are read by windows are taken by tiles as arrays are.
                predictions = predict_in_halves(self.predictor, [cast(np.ndarray, r.image) for r in batch])
            return [(r.number, p.named(r.sample.image_id)) for r, p in zip(batch, predictions, strict=True)]
        except Exception as error:
            # A large file is read while it is predicted, and may turn out damaged only then.
            failed = image_failure(error, self.predictor, batch[0].sample)
            if failed is None:
                raise
            if len(batch) > 1:
                return [result for one in batch for result in self._predict([one])]
            return [(batch[0].number, failure(batch[0].sample, failed.kind, one_line(failed)))]
