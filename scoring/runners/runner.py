"""The protocol of runners: a runner predicts the images of shards, here or elsewhere; the job writes them down."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from models.instances import Instances
from pipelines.data.dataset import Sample
from scoring.reader import Failure

# (position of the shard, of the image in it, its result)
ShardResult = tuple[int, int, Instances | Failure]


class Runner(Protocol):
    """Predicts shards; every image of them comes out once, as Instances or Failure."""

    def results(self, shards: Sequence[Sequence[Sample]]) -> Generator[ShardResult, None, None]:
        """Results in any order; they depend on nothing but the image's shard. Whoever stops early closes them."""
        ...

    def little(self, position: int) -> list[str]:
        """Ids of the images of a shard, predicted by now, that fill little of their range; each call takes them out."""
        ...

    def timings(self) -> dict[str, float]:
        """Seconds by operation of the results so far, all threads and processes together."""
        ...

    def peak_megabytes(self) -> dict[str, float]:
        """Highest memory so far in MB (10^6 bytes), by kind: ``memory`` of a process, ``gpu_memory``."""
        ...
