"""Parts scored by Ray actors, which publish them themselves: the driver sends numbers and receives sums."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pipelines.progress import pass_through
from scoring.parts.job import Bar
from scoring.parts.part import Mark, score_part
from scoring.parts.place import Place
from scoring.parts.plan import Plan, file_of
from scoring.requests import JobSettings
from scoring.runners.local import LocalRunner
from scoring.runners.ray_runner import (
    MOST_BLOCKS,
    RaySettings,
    actor_errors,
    actor_runner,
    cluster,
    import_ray,
    packed_model,
    pool,
)


class RayParts:
    """Scores parts in the actors of a Ray cluster; the place must be one that all of them can write.

    Raises:
        EngineMissing: Ray is not installed.
    """

    def __init__(self, folder: Path, how: RaySettings, place: Place, plan: Plan, settings: JobSettings) -> None:
        import_ray()
        self.folder, self.how, self.place, self.plan, self.settings = folder, how, place, plan, settings
        self._peaks: dict[str, float] = {}

    def run(self, numbers: Mapping[int, Mark | None], bar: Bar) -> Generator[tuple[int, Mark], None, None]:
        """See `PartRunner`. A lost actor or node is made up for: its part is scored again by another one.

        Raises:
            PlanesError: what scoring a part here would raise; the cluster cannot be reached.
        """
        ray = import_ray()
        if not numbers:
            return
        work = pickle.dumps((str(self.place), self.plan.model_dump_json(), self.settings))
        with cluster(self.how.address), actor_errors():
            packed = packed_model(self.folder)
            todo = [{"number": number, "again": pickle.dumps(mark)} for number, mark in numbers.items()]
            for start in range(0, len(todo), MOST_BLOCKS):
                items = todo[start : start + MOST_BLOCKS]
                how = pool(self.how, len(items))
                more = {"packed": packed, "how": self.how, "threads": how.pop("threads"), "work": work}
                dataset = ray.data.from_items(items, override_num_blocks=len(items))
                dataset = dataset.map_batches(_PartActor, fn_constructor_kwargs=more, **how)
                rows = iter(dataset.iter_rows())
                with closing(rows):
                    for row in rows:
                        mark, peaks = pickle.loads(row["mark"])
                        for kind, megabytes in peaks.items():
                            self._peaks[kind] = max(self._peaks.get(kind, 0.0), megabytes)
                        if numbers[row["number"]] is None:
                            bar.whole(mark.totals)
                        yield row["number"], mark

    def peak_megabytes(self) -> dict[str, float]:
        """See `PartRunner`; of the actor with the most."""
        return dict(self._peaks)


class _PartActor:
    """Loads the model once, scores and publishes a part a call."""

    def __init__(self, packed: bytes, how: RaySettings, threads: int, work: bytes) -> None:
        place, plan, self.settings = pickle.loads(work)
        self.place, self.plan = Place(place), Plan.model_validate(json.loads(plan))
        self.runner: LocalRunner = actor_runner(packed, how, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"number": [], "mark": []}
        for number, again in zip(batch["number"], batch["again"], strict=True):
            with tempfile.TemporaryDirectory(prefix="planes-part-") as scratch:
                mark = score_part(
                    self.runner,
                    self.place,
                    self.plan,
                    int(number),
                    scratch=Path(scratch) / file_of(int(number), ""),
                    settings=self.settings,
                    progress=pass_through,
                    again=pickle.loads(again),
                )
            out["number"].append(int(number))
            out["mark"].append(pickle.dumps((mark, self.runner.peak_megabytes())))
        return out
