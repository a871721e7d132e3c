"""The Ray runner against the local one on CPU threads: overhead, and how throughput grows with actors."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

# Equal threads in every process, before torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.scoring import write_images
from benchmarks.tiles import random_model
from models.loading import load_model
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.job import run_job
from scoring.requests import JobSettings
from scoring.runners.local import LocalRunner
from scoring.runners.ray_runner import RayRunner, RaySettings
from scoring.runners.runner import Runner

SHARD = 8


def timed_job(runner: Runner, model: Path, images: Path, out: Path) -> tuple[float, float, bytes]:
    """(seconds of the job, seconds until its first result, instance table)."""
    first: list[float] = []
    started = time.perf_counter()

    def progress(results, *_):  # type: ignore[no-untyped-def]
        for result in results:
            first.append(time.perf_counter() - started)
            yield result

    predictor = load_model(model, "cpu", {"size": 0})
    run_job(
        predictor,
        "m/1",
        open_dataset(images),
        out,
        settings=JobSettings(shard_size=SHARD, overlays=0),
        progress=progress,
        runner=runner,
    )
    return time.perf_counter() - started, first[0], (out / "m-1" / "instances.parquet").read_bytes()


def main() -> None:
    """Print seconds, ratios and the expected ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=160)
    count = parser.parse_args().images
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = Path(tempfile.mkdtemp())
    model = random_model(work / "model")
    write_images(work / "images", count, 256, 640)
    local, first, table = timed_job(
        LocalRunner(load_model(model, "cpu", {"size": 0})), model, work / "images", work / "local"
    )
    print(f"{count} images, shards of {SHARD}, {os.environ['OMP_NUM_THREADS']} thread a process, {os.cpu_count()} CPUs")
    print(f"local                    {local:.1f} s")
    for actors in (1, 2):
        runner = RayRunner(model, RaySettings(tiling={"size": 0}, actors=actors))
        seconds, start, rows = timed_job(runner, model, work / "images", work / f"ray{actors}")
        # The first shard is done when the first result comes; the start is what is left of that time.
        shard = (local - first) / (count / SHARD)
        start -= shard
        paper = start + (local - first) / actors
        print(
            f"Ray, {actors} actor{'s' if actors > 1 else ' '}            {seconds:.1f} s   ratio {seconds / local:.2f}; "
            f"start {start:.1f} s, after it {(seconds - start) / (local / actors):.2f} of local / actors; "
            f"on paper {paper:.1f} s; tables {'equal' if rows == table else 'DIFFER'}"
        )


if __name__ == "__main__":
    main()
