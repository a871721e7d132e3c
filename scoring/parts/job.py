"""A job in parts: planned once, scored part by part by whoever runs it, counted by the marks of the parts that are done."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from models.errors import DataError, OutputError, one_line
from models.instances import Instances
from pipelines.data.readers.listing import Listing
from pipelines.progress import Progress, pass_through
from scoring.jobs.manifest import LOCK, LOGGED, MANIFEST, PLAN
from scoring.jobs.manifest import clear as clear_job
from scoring.jobs.shards import Totals, sums
from scoring.parts.part import Mark, score_part
from scoring.parts.place import Place
from scoring.parts.plan import (
    DONE,
    ERRORS,
    FIRST_LISTS,
    GENERATIONS,
    GONE,
    INPUTS,
    INSTANCES,
    LISTS,
    SUMMARY,
    UPDATE_FILE,
    Plan,
    file_of,
    numbers_of,
    read_plan,
)
from scoring.parts.planning import plan_images
from scoring.parts.updates import amend, publish_all, read_marks
from scoring.reader import Failure
from scoring.requests import JobSettings
from scoring.runners.runner import Runner, ShardResult

# What a job in parts works in, in its folder or, where that is an object store, in the user's cache.
PLANNING, SCRATCH, UPDATING = ".planning", ".parts", ".updating"


@dataclass
class PartsResult:
    """What a job in parts left.

    Attributes:
        place: where it is.
        plan: what it is over.
        totals: sums over all parts.
        resumed: images of parts that had been scored before.
        pending: images of the parts that were scored now.
        rate: images a second of this call, by the clock; None where it scored no part.
        peaks: highest memory in MB by kind.
        megabytes: size of the saved model.
        run_id: of the MLflow run that this call logged.
        unlogged: why the tracking store did not take it.
        updated: whether this call has added a generation.
        unchanged: whether nothing was new, and the run of these outputs is there.
    """

    place: Place
    plan: Plan
    totals: Totals
    resumed: int = 0
    pending: int = 0
    rate: float | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    megabytes: float = math.nan
    run_id: str | None = None
    unlogged: str | None = None
    updated: bool = False
    unchanged: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What a script asks for, as plain values; the same keys as of a job in one piece."""
        return {
            "version": self.label,
            "folder": self.place,
            "run_id": self.run_id,
            "unlogged": self.unlogged,
            "images": self.images,
            "planes": self.totals.instances,
            "failed": self.failures,
            "errors": f"{self.place}/{ERRORS}" if self.failures else None,
            "seconds": self.totals.seconds,
            "metrics": {},
            "unchanged": self.unchanged,
        }

    @property
    def label(self) -> str:
        """Of the version."""
        return self.plan.label

    @property
    def images(self) -> int:
        """How many were predicted."""
        return self.totals.images

    @property
    def failures(self) -> int:
        """Images that could not be read or predicted."""
        return self.totals.failures


class PartRunner(Protocol):
    """Scores parts and publishes them, here or elsewhere."""

    def run(self, numbers: Mapping[int, Mark | None], bar: Bar) -> Generator[tuple[int, Mark], None, None]:
        """Score parts; those with a mark are done but for images to try again. Each comes out when it is published."""
        ...

    def peak_megabytes(self) -> dict[str, float]:
        """See `scoring.runners.runner.Runner`."""
        ...


class Bar:
    """One progress bar over many parts, some of which come image by image and others whole."""

    def __init__(self, progress: Progress, total: int, title: str) -> None:
        self._waiting: deque[ShardResult] = deque()
        self._shown = iter(progress(self._feed(), total, title))
        self.shown = 0

    def _feed(self) -> Iterator[ShardResult]:
        while self._waiting:
            yield self._waiting.popleft()

    def of_part(self, items: Iterable[ShardResult], total: int, title: str) -> Iterator[ShardResult]:
        """The progress of one part, image by image; a `Progress`."""
        for item in items:
            self.advance(item)
            yield item

    def advance(self, item: ShardResult) -> None:
        """One more image is done."""
        self.shown += 1
        self._waiting.append(item)
        next(self._shown, None)

    def whole(self, totals: Totals, shown: int = 0) -> None:
        """All images of a part are done, of which some are shown already."""
        failed: ShardResult = (0, 0, Failure("", "", "", ""))
        unseen = [failed] * totals.failures + [(0, 0, Instances.empty("", 1, 1))] * totals.images
        for item in unseen[shown:]:
            self.advance(item)

    def close(self) -> None:
        """No more come."""
        next(self._shown, None)


class LocalParts:
    """Scores parts in this process, one after the other."""

    def __init__(self, runner: Runner, place: Place, plan: Plan, settings: JobSettings, scratch: Path) -> None:
        self.runner, self.place, self.plan, self.settings, self.scratch = runner, place, plan, settings, scratch

    def run(self, numbers: Mapping[int, Mark | None], bar: Bar) -> Generator[tuple[int, Mark], None, None]:
        """See `PartRunner`."""
        for number, mark in numbers.items():
            shown = bar.shown
            done = score_part(
                self.runner,
                self.place,
                self.plan,
                number,
                scratch=self.scratch / file_of(number, ""),
                settings=self.settings,
                progress=pass_through if mark else bar.of_part,
                again=mark,
            )
            if mark is None:
                bar.whole(done.totals, bar.shown - shown)
            yield number, done
        # Also of parts that were marked by a process that was killed before it had removed what it worked in.
        shutil.rmtree(self.scratch, ignore_errors=True)

    def peak_megabytes(self) -> dict[str, float]:
        """See `PartRunner`."""
        return self.runner.peak_megabytes()


def planned(
    place: Place, listing: Listing, requested: dict[str, Any], *, fresh: bool = False, cache: Path | None = None
) -> Plan:
    """The plan of a place: the one that is there, if it is of the same job, or a new one.

    What was listed once stays the list of the job: images that have come since are not among it.

    Args:
        requested: fields of the plan that decide the rows.
        cache: folder to work in where the place is an object store.

    Raises:
        DataError: the place holds another job, or the images cannot be listed.
        OutputError: the place cannot be written.
    """
    staging = working_folder(place, PLANNING, cache)
    if fresh:
        clear(place, cache)
        shutil.rmtree(staging, ignore_errors=True)
    held = read_plan(place)
    if held is None:
        _refuse_others(place)
        # What a removal that was stopped has left is not to be read beside the new tables.
        clear(place, cache, keep_lists=True)
        listed = plan_images(listing, staging, requested["part_size"])
        plan = Plan(**requested, inputs=listed.digest, images=listed.images, planned=listed.at)
        publish_all(place, plan.folder, listed.folder)
        place.create(PLAN, plan.text.encode())
        shutil.rmtree(staging, ignore_errors=True)
        # That of whoever was first, where two have planned at once.
        held = read_plan(place)
        assert held is not None
    differing = held.refusal(requested)
    if differing:
        raise DataError(f"{place}: holds a scoring with {differing}; name another --out, or --fresh to score anew")
    return held


def working_folder(place: Place, name: str, cache: Path | None) -> Path:
    """Where a job works on this machine: in its own folder, or in one of the cache that belongs to its URL."""
    if place.local is not None:
        return place.local / name
    assert cache is not None, "a URL has no folder of this machine"
    return cache / hashlib.sha256(str(place).encode()).hexdigest()[:16] / name


def run_parts(place: Place, plan: Plan, runner: PartRunner, progress: Progress) -> PartsResult:
    """Score the parts that are not done, and try images again that could not be had; return the sums.

    Raises:
        OutputError: the place cannot be written.
    """
    marks = read_marks(place, plan)
    made = [name for one in plan.generations for name in (one.folder, one.removed) if name]
    for folder in (DONE, INSTANCES, ERRORS, INPUTS, GENERATIONS, *made):
        place.sweep(folder)
    marks = amend(place, plan, marks)
    pending: dict[int, Mark | None] = {n: None for n in plan.numbers if n not in marks}
    left = sum(plan.of(n).size(n) for n in pending)
    again = {n: mark for n, mark in marks.items() if mark.again}
    started = time.monotonic()
    try:
        bar = Bar(progress if left else pass_through, left, f"scoring with {plan.label}")
        with closing(runner.run({**again, **pending}, bar)) as results:
            for number, mark in results:
                # Of a part that had lost its mark, all images of its list were scored.
                marks |= amend(place, plan, {number: mark})
        bar.close()
    except OSError as error:
        raise OutputError(
            f"{place}: cannot be written ({error.strerror or one_line(error)}); what is done is kept, call again"
        ) from error
    now, seconds = sum(marks[n].totals.images for n in pending), time.monotonic() - started
    if not set(marks) <= numbers_of(place.names(DONE)):
        raise OutputError(f"{place}: somebody has removed parts of it meanwhile; call again")
    totals = sums(marks[n].totals for n in plan.numbers)
    parts = {"parts": len(plan.numbers), "generations": len(plan.generations)}
    _write_summary(place, (json.dumps({**parts, **asdict(totals)}, indent=2) + "\n").encode())
    rate = now / max(seconds, 1e-9) if pending else None
    # A part that had lost its mark may have fewer images than its plan says.
    resumed = max(0, totals.images + totals.failures - left)
    return PartsResult(place, plan, totals, resumed, left, rate=rate, peaks=runner.peak_megabytes())


def check_any(result: PartsResult) -> None:
    """Refuse a job of which no image could be scored; what failed stands in its tables.

    Raises:
        DataError: it is one.
    """
    if result.failures and not result.images:
        raise DataError(f"none of {result.failures} images could be scored; see {result.place}/{ERRORS}")


def _write_summary(place: Place, content: bytes) -> None:
    with suppress(FileNotFoundError):
        if place.read(SUMMARY) == content:
            return
    place.write(SUMMARY, content)


@contextmanager
def held(place: Place, cache: Path | None = None) -> Iterator[None]:
    """Hold the folder that a job works in on this machine; in an object store other machines may score the same.

    Raises:
        OutputError: another process of this machine is scoring there, or the folder cannot be written.
    """
    folder = working_folder(place, "", cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{place}: another score is writing there; wait for it or name another --out") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or one_line(error)})") from error
    try:
        yield
    finally:
        lock.release()


def clear(place: Place, cache: Path | None = None, *, keep_lists: bool = False) -> None:
    """Remove what a job in parts left there and nothing else, the plan first: what a stop leaves is taken for no job.

    Args:
        keep_lists: leave the lists of a plan that was never updated: planning goes on with them.

    Raises:
        OutputError: something of it cannot be removed.
    """
    place.remove("", [PLAN])
    if place.local is not None and (place.local / MANIFEST).exists():
        place.remove("", [MANIFEST])
        clear_job(place.local)
    # Also those that no plan names: of updates that were stopped, or whose plan is damaged. Updates take images from lists.
    updates = [name for name in place.names(GENERATIONS) if UPDATE_FILE.fullmatch(name)]
    kept = FIRST_LISTS if keep_lists and not updates else None
    made = [name for name in place.folders() if LISTS.fullmatch(name) and not (kept and kept.fullmatch(name))]
    gone = [name for name in place.folders(GONE) if re.fullmatch(r"\d{4,}", name)]
    made += [f"{GONE}/{number}/{name}" for number in gone for name in (INPUTS, INSTANCES)]
    for folder in (*made, DONE, INSTANCES, ERRORS, INPUTS):
        place.remove(folder, [name for name in place.names(folder) if numbers_of([name])])
    # Last: where they are, no list is kept.
    place.remove(GENERATIONS, updates)
    place.remove("", [SUMMARY, LOGGED])
    for name in (SCRATCH, UPDATING):
        shutil.rmtree(working_folder(place, name, cache), ignore_errors=True)


def clear_parts(folder: Path) -> None:
    """Remove a job in parts from a folder of this machine, for one that does not lie in parts; nothing where there is none.

    Raises:
        OutputError: it cannot be removed, or another process is scoring there.
    """
    if (folder / PLAN).exists():
        place = Place(folder)
        with held(place):
            clear(place)
            shutil.rmtree(folder / PLANNING, ignore_errors=True)


def _refuse_others(place: Place) -> None:
    if place.local is not None and (place.local / MANIFEST).exists():
        raise DataError(
            f"{place}: holds a scoring that is not in parts; name another --out, leave out --part-size, or --fresh"
        )
