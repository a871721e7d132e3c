"""What jobs in one piece and in parts have in common, before they begin and after they end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from models.saved.scores import Scores
from models.saved.spec import read_spec
from pipelines.data.dataset import Dataset
from scoring.jobs.manifest import Generation
from scoring.requests import Execution, JobSettings
from scoring.runners.local import auto_batch, auto_workers
from scoring.runners.ray_runner import RaySettings

log = logging.getLogger(__name__)


def scores_of(label: str, folder: Path, settings: JobSettings) -> Scores | None:
    """What the version's scores mean; other tiles than its own make other scores."""
    scores = read_spec(folder).scores
    if scores is not None and settings.tiling:
        log.info(f"{label}: no probabilities, and no suggested score: they were learnt with the version's own tiles")
        return None
    return scores


def folder_megabytes(folder: Path) -> float:
    """Size of a saved model in MB (10^6 bytes)."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def ray_settings(settings: JobSettings, device: str, dataset: Dataset, execution: Execution) -> RaySettings:
    """How a job over a data set, or a part of one, is predicted, in actors or here."""
    return RaySettings(
        device=device,
        batch_size=settings.batch_size or auto_batch(device),
        workers=settings.workers or auto_workers(device, dataset),
        precision=settings.precision,
        tiling=settings.changes,
        address=execution.address,
        actors=execution.actors,
        most_actors=execution.most_actors,
    )


def tell_generation(one: Generation) -> None:
    """Say what an update found among the inputs."""
    kinds = ", ".join(f"{getattr(one, k)} {k}" for k in ("new", "changed", "retried", "returned", "kept", "gone"))
    kinds += f"; files of {one.unreadable} that were kept cannot be read now" if one.unreadable else ""
    log.info(f"   generation {one.number}: {kinds}")


def tell_work(timings: Mapping[str, float], peaks: Mapping[str, float], little: int, first_little: str) -> None:
    """Say what took how long and how much, and how many images fill little of the range that they are read with."""
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in sorted(timings.items(), key=lambda s: -s[1]))
    high = ", ".join(f"peak {kind.replace('_', ' ')} {megabytes:,.0f} MB" for kind, megabytes in peaks.items())
    log.info(f"   {took or 'no operations timed'}" + (f"; {high}" if high else ""))
    if little:
        log.info(
            f"   {little} images fill less than an eighth of the range that they are read with (first: {first_little}): "
            "too dark or pale for the model? See --range"
        )
