"""What a job's folder lacks is made: shards predicted by a runner, written while the next ones are predicted, joined."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.progress import Progress
from scoring.jobs.manifest import Manifest
from scoring.jobs.retry import can_be_tried_again, failed_before, replace_in_shard, split_into_shards
from scoring.jobs.shards import Totals, finished, join_shards, totals_of, write_shard
from scoring.jobs.update import bring_up_to_date
from scoring.reader import Failure
from scoring.requests import JobSettings
from scoring.runners.runner import Runner, ShardResult


def complete(
    runner: Runner,
    manifest: Manifest,
    folder: Path,
    dataset: Dataset,
    *,
    settings: JobSettings,
    progress: Progress,
    held: Manifest | None,
) -> tuple[int, Totals]:
    """Make what the folder lacks; return how many images were not scored now, and the sums over all.

    Args:
        held: manifest of the job of other inputs that is brought up to date.
    """
    fill = partial(_make_missing, runner, score_threshold=settings.score_threshold, progress=progress)
    if held is not None:
        resumed = bring_up_to_date(folder, held, manifest, dataset=dataset, fill=fill, scores=settings.scores)
    else:
        again = _try_again(runner, manifest, folder, dataset, score_threshold=settings.score_threshold, progress=progress)
        resumed = len(dataset) - again
        if totals_of(folder) is None:
            resumed = fill(folder, manifest, dataset) - again
            join_shards(folder, len(manifest.shards()), settings.scores)
    totals = totals_of(folder)
    assert totals is not None
    return resumed, totals


def _try_again(
    runner: Runner, manifest: Manifest, folder: Path, dataset: Dataset, *, score_threshold: float, progress: Progress
) -> int:
    """Predict images again that could not be fetched in an earlier call; return how many have a new result."""
    failed, shards = failed_before(folder, manifest, dataset), manifest.shards()
    if not failed:
        return 0
    samples = {number: dataset.samples[shards[number].start : shards[number].stop] for number in failed}
    numbers = sorted(failed)
    retried = [[samples[number][position] for position in failed[number]] for number in numbers]
    started, total, changed = time.monotonic(), sum(map(len, retried)), 0
    results: dict[int, dict[int, Instances | Failure]] = {}
    with _arriving(runner, retried, progress, f"trying {total} images again") as arriving:
        for place, index, result in arriving:
            number = numbers[place]
            mine = results.setdefault(number, {})
            mine[failed[number][index]] = result.above(score_threshold) if isinstance(result, Instances) else result
            if len(mine) < len(retried[place]):
                continue
            # A shard at a time, so that a stop loses no more than one.
            news = {p: r for p, r in results.pop(number).items() if not _failed_again(r, samples[number][p])}
            if news:
                totals = totals_of(folder)
                if totals is not None:
                    split_into_shards(folder, manifest, dataset, totals)
                seconds, little = time.monotonic() - started, runner.little(place)
                replace_in_shard(folder, number, samples[number], news, seconds=seconds, little=little)
                started, changed = time.monotonic(), changed + len(news)
    return changed


def _failed_again(result: Instances | Failure, sample: Sample) -> bool:
    return isinstance(result, Failure) and can_be_tried_again(result, sample)


def _make_missing(
    runner: Runner, folder: Path, manifest: Manifest, dataset: Dataset, *, score_threshold: float, progress: Progress
) -> int:
    """Predict and write the shards that are not there; return how many images the others hold."""
    done, shards = finished(folder), manifest.shards()
    missing = [i for i in range(len(shards)) if i not in done]
    unscored = [dataset.samples[shards[i].start : shards[i].stop] for i in missing]
    total = sum(map(len, unscored))
    if not total:
        return len(dataset)
    collected: dict[int, dict[int, Instances | Failure]] = {}
    started, counted = time.monotonic(), runner.timings()
    with _Writer() as writer, _arriving(runner, unscored, progress, f"scoring with {manifest.label}") as arriving:
        for position, index, result in arriving:
            mine = collected.setdefault(position, {})
            mine[index] = result.above(score_threshold) if isinstance(result, Instances) else result
            if len(mine) < len(unscored[position]):
                continue
            results = [mine[i] for i in range(len(mine))]
            del collected[position]
            now, timings = time.monotonic(), runner.timings()
            spent = {operation: seconds - counted.get(operation, 0.0) for operation, seconds in timings.items()}
            little = runner.little(position)
            writer.submit(
                partial(
                    write_shard, folder, missing[position], results, seconds=now - started, timings=spent, little=little
                )
            )
            started, counted = now, timings
    return len(dataset) - total


@contextmanager
def _arriving(
    runner: Runner, shards: Sequence[Sequence[Sample]], progress: Progress, label: str
) -> Iterator[Iterable[ShardResult]]:
    """The runner's results under a progress bar.

    They end at once where the caller stops or fails: Ray's pipeline must not outlive its cluster.
    """
    with closing(runner.results(shards)) as results:
        yield progress(results, sum(map(len, shards)), label)


class _Writer:
    """Writes shards in a thread of its own while the next ones are predicted; one waits at most."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Write, once the shard before is on disk.

        Raises:
            OSError: the shard before could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        self._pending = self._pool.submit(write)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Interrupted or failed, what has been predicted is still written.
        self._pool.shutdown(wait=True)
        if error is None and self._pending is not None:
            self._pending.result()
