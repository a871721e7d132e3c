"""Versions scored in parts: what `score` does over lists that memory need not hold, and into object stores."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.errors import DataError, one_line
from models.images.rendering import parse_rendering
from models.loading import load_model
from models.runtime.cache import cache_base
from models.saved.folder import folder_digest
from models.saved.spec import read_spec
from pipelines.data.readers.listing import Listing, open_listing
from pipelines.data.remote import is_url, to_path
from pipelines.evaluation.categories import category_of
from pipelines.evaluation.inference import is_segmenter
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.use_cases.display import SILENT, Display, pass_through
from scoring import mlflow_log
from scoring.common import folder_megabytes, ray_settings, scores_of, tell_generation, tell_work
from scoring.jobs.job import decisive_settings, folder_name
from scoring.jobs.manifest import LOGGED, MANIFEST, PLAN
from scoring.parts.job import (
    SCRATCH,
    UPDATING,
    LocalParts,
    PartRunner,
    PartsResult,
    check_any,
    held,
    planned,
    run_parts,
    working_folder,
)
from scoring.parts.on_ray import RayParts
from scoring.parts.place import Place
from scoring.parts.plan import SUMMARY, Plan, read_plan
from scoring.parts.updates import updated
from scoring.requests import ScoreRequest
from scoring.runners.local import LocalRunner
from scoring.runtimes import Conditions, choose_runtime

log = logging.getLogger(__name__)

# Images from which a job lies in parts, and those of a part where none is asked for.
MOST_WHOLE, PART_SIZE = 100_000, 4_096


def listing_in_parts(request: ScoreRequest, labels: Sequence[str]) -> Listing | None:
    """What is to be scored in parts; None for a job as small ones are.

    Jobs lie in parts in a URL, where ``part_size`` is given, where the folder holds one, and from 100,000 images on.

    Raises:
        DataError: parts are wanted of images that are annotated, or of a single one.
    """
    folders = [place.local for place in (_place(request.out, label) for label in labels) if place.local is not None]
    fresh, asked = request.settings.fresh, is_url(request.out) or request.settings.part_size is not None
    wanted = asked or (not fresh and any((folder / PLAN).exists() for folder in folders))
    # A job goes on as it began.
    whole = not fresh and any((folder / MANIFEST).exists() for folder in folders)
    if whole and not wanted:
        return None
    listing = open_listing(request.data, request.split)
    if listing is None:
        if wanted:
            raise DataError(
                f"{request.data}: annotated, or a single image; jobs in parts are over images without annotations: name a "
                "folder, a list or a glob, and an --out of this machine for the rest"
            )
        return None
    if not wanted and not listing.has_more_than(MOST_WHOLE):
        return None
    return listing


def score_in_parts(
    registry: Registry,
    request: ScoreRequest,
    versions: Sequence[tuple[Resolved, Path]],
    listing: Listing,
    *,
    device: str,
    thresholds: Sequence[float],
    display: Display = SILENT,
) -> list[PartsResult]:
    """Score a listing with each of the versions; see `scoring.use_cases.score`."""
    return [
        _score(
            registry,
            replace(request, settings=replace(request.settings, score_threshold=threshold)),
            version,
            folder,
            listing=listing,
            device=device,
            display=display,
        )
        for (version, folder), threshold in zip(versions, thresholds, strict=True)
    ]


def _place(out: str, label: str) -> Place:
    return Place(to_path(out) / folder_name(label))


def _score(
    registry: Registry,
    request: ScoreRequest,
    version: Resolved,
    folder: Path,
    *,
    listing: Listing,
    device: str,
    display: Display,
) -> PartsResult:
    place = _place(request.out, version.label)
    fresh = request.settings.fresh
    there = None if fresh else read_plan(place)
    now = Conditions(
        device=device,
        precision=request.settings.precision,
        settings=there.settings if there else None,
        elsewhere=bool(request.execution.address),
        fresh=fresh,
    )
    chosen = choose_runtime(registry, version, folder, runtime=request.runtime, now=now)
    settings = replace(request.settings, runtime=chosen.name, precision=chosen.precision or request.settings.precision)
    settings = replace(settings, scores=scores_of(version.label, folder, settings))
    on_ray = request.execution.runner == "ray"
    predictor = load_model(chosen.folder, "cpu" if on_ray else device, settings.changes)
    if is_segmenter(predictor):
        raise DataError(f"{version.label}: outlines given boxes, which images without annotations have not")
    rendering = parse_rendering(settings.value_range, settings.bands, read_spec(chosen.folder).rendering)
    source = listing.where if is_url(listing.where) else os.path.abspath(listing.where)
    part = settings.part_size or (there.part_size if there else PART_SIZE)
    requested: dict[str, Any] = {
        "label": version.label,
        "model": folder_digest(chosen.folder)[:16],
        "settings": decisive_settings(predictor, rendering, settings, device),
        "data": Path(source.rstrip("/")).name or source,
        "source": source,
        "split": request.split,
        "category": category_of(folder, version.label, measured=False),
        # Whole shards, so that the batches are those of any other cut.
        "part_size": -(-part // settings.shard_size) * settings.shard_size,
        "shard_size": settings.shard_size,
    }
    cache = cache_base() / "scoring"
    with held(place, cache):
        plan = planned(place, listing, requested, fresh=request.settings.fresh, cache=cache)
        _announce(plan, begun=there is not None and not settings.update)
        how = ray_settings(settings, device, plan.dataset(place, 0), request.execution)
        # On a terminal Ray shows its own bars.
        progress = pass_through if on_ray and sys.stderr.isatty() else display.items

        def run(plan: Plan) -> PartsResult:
            runner: PartRunner
            if on_ray:
                runner = RayParts(chosen.folder, how, place, plan, settings)
            else:
                local = LocalRunner(predictor, device, batch_size=how.batch_size, workers=how.workers, kind=how.precision)
                runner = LocalParts(local, place, plan, settings, working_folder(place, SCRATCH, cache))
            return run_parts(place, plan, runner, progress)

        result = run(plan)
        if there and settings.update:
            result = _brought_up_to_date(result, listing, requested, working_folder(place, UPDATING, cache), run)
    result.megabytes = folder_megabytes(chosen.folder)
    params = {k: v for k, v in settings.__dict__.items() if k != "scores"} | request.execution.__dict__
    params |= {"batch_size": how.batch_size, "device": device, "data": plan.source, "part_size": plan.part_size}
    params |= {"range": rendering.range, "bands": rendering.bands or "auto"}
    return _finished(registry, result, version, params)


def _finished(registry: Registry, result: PartsResult, version: Resolved, params: dict[str, Any]) -> PartsResult:
    """The result, said and logged, unless it was logged before."""
    check_any(result)
    _tell(result)
    result.unchanged = _is_logged(result.place, result.plan)
    if result.unchanged:
        log.info(f"   nothing new; outputs in {result.place}")
    else:
        _log(registry, result, version, params)
    return result


def _announce(plan: Plan, *, begun: bool) -> None:
    since = f", updated {len(plan.later)} times" if plan.later else ""
    when = f", listed {plan.generations[-1].planned}; --update takes what has come since" if begun else ""
    log.info(f"{plan.data}: {plan.images:,} images in {plan.parts:,} parts of {plan.part_size}{since}{when}")


def _brought_up_to_date(
    done: PartsResult, listing: Listing, requested: dict[str, Any], staging: Path, run: Callable[[Plan], PartsResult]
) -> PartsResult:
    """A finished job over the images that are there now; as it is where they are the same."""
    log.info(f"{done.plan.data}: listing what is there now")
    plan = updated(done.place, done.plan, listing, requested, staging)
    return done if plan is done.plan else replace(run(plan), updated=True)


def _log(registry: Registry, result: PartsResult, version: Resolved, params: dict[str, Any]) -> None:
    try:
        result.run_id = mlflow_log.log_parts(registry.client, result, version, params=params)
        result.place.write(LOGGED, _state(result.place, result.plan))
        log.info(f"   outputs in {result.place}, run {result.run_id}")
    except Exception as error:
        if os.environ.get("PLANES_TRACEBACK"):
            raise
        # What was scored is there; a store that is away must not keep the next model from being scored.
        result.unlogged = one_line(error, 200)
        log.info(f"   outputs in {result.place}; NOT LOGGED: {result.unlogged}")


def _is_logged(place: Place, plan: Plan) -> bool:
    """Whether the run of these very outputs is there."""
    try:
        return place.read(LOGGED) == _state(place, plan)
    except FileNotFoundError:
        return False


def _state(place: Place, plan: Plan) -> bytes:
    return hashlib.sha256(plan.all_inputs.encode() + place.read(SUMMARY)).hexdigest().encode()


def _tell(result: PartsResult) -> None:
    totals = result.totals
    errors = f", {totals.failures} failed (see {result.place}/errors)" if totals.failures else ""
    errors += f", {result.resumed} of them scored before" if result.resumed else ""
    # Actors work side by side: the seconds of all parts say nothing of the clock.
    speed = f", {result.rate:.3g} images/s now" if result.rate is not None else ""
    seconds = f"{totals.seconds:.1f} s of work"
    log.info(f"{result.label}: {totals.instances} planes in {totals.images} images{errors}, {seconds}{speed}")
    news = result.plan.generations[-1].news
    if news is not None and result.updated:
        tell_generation(news)
    tell_work(totals.timings, result.peaks, totals.little, totals.first_little)
