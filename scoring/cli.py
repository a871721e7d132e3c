"""The ``score`` command. Imports of ours stay inside the commands: ``--help`` must answer at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from pipelines.steps.commands import Group, files
from pipelines.steps.options import option
from pipelines.steps.reporting import MANY_ERRORS, end, record
from scoring.requests import DEFAULT_THRESHOLD, ComparisonRequest, Execution, JobSettings, LayerSettings, ScoreRequest

N = TypeVar("N", int, float, str)

# The default of options that a model version decides.
VERSION = "version"
AUTO = "auto"

RLE = option(JobSettings, "rle")
GEOJSON = option(JobSettings, "geojson")
CATEGORY = option(ComparisonRequest, "category")

HEADINGS = {
    "Input": ("models", "data", "split", "scene_pattern", "value_range", "bands"),
    "Output": ("out", "score_threshold", "overlays", "rle", "geojson", "max_errors"),
    "Going on, and only what is new": ("update", "fresh", "shard", "part_size"),
    "Model and speed": ("device", "runtime", "precision", "batch", "workers"),
    "Tiles": ("tile", "tile_overlap", "merge", "match", "merge_threshold", "full_image", "turns"),
    "Ray": ("runner", "ray_address", "actors"),
}


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"max_content_width": 110},
    headings=HEADINGS,
    env="PLANES_SCORE",
    reports=True,
    alone="; to score images: score --model NAME/VERSION --data IMAGES",
    examples=(
        "score --model planes-det/production --data data/airfield --out predictions",
        "score --model planes-det/2 --model planes-det/3 --data test_coco.json --out both",
        "score --model planes-det/production --data survey --out nightly --update",
    ),
)
@option(ScoreRequest, "models", "--model")
@option(ScoreRequest, "data")
@option(ScoreRequest, "out")
@option(ScoreRequest, "split")
@option(ScoreRequest, "device")
@option(JobSettings, "batch_size", "--batch", "batch", default=AUTO)
@option(JobSettings, "precision")
@option(ScoreRequest, "runtime")
@option(JobSettings, "value_range", "--range", default=VERSION)
@option(JobSettings, "bands", default=VERSION)
@click.option("--tile", default=VERSION, show_default=True, help="Side of the tiles in pixels; none: whole images.")
@click.option("--tile-overlap", default=VERSION, show_default=True, help="Share of a tile that neighbours share.")
@click.option(
    "--merge",
    default=VERSION,
    show_default=True,
    type=click.Choice([VERSION, "join", "nms"]),
    help="Cut planes: join or NMS.",
)
@click.option(
    "--match",
    default=VERSION,
    show_default=True,
    type=click.Choice([VERSION, "iou", "ios"]),
    help="Overlap that is compared.",
)
@click.option("--merge-threshold", default=VERSION, show_default=True, help="Least overlap of detections of one plane.")
@click.option(
    "--full-image", default=VERSION, show_default=True, help="Longer side for a pass over the whole image; or none."
)
@click.option(
    "--turns",
    default=VERSION,
    show_default=True,
    type=click.Choice([VERSION, "1", "2", "4", "8"]),
    help="Looks at each image, turned and mirrored, that are averaged.",
)
@option(
    JobSettings,
    "score_threshold",
    default="0.05",
    help="Least score that is kept; auto: the one that the version suggests.",
)
@option(JobSettings, "overlays", type=click.IntRange(0))
@RLE
@GEOJSON
@option(JobSettings, "workers", default=AUTO)
@option(JobSettings, "shard_size", "--shard", "shard", type=click.IntRange(1))
@option(JobSettings, "part_size", type=click.IntRange(1))
@option(JobSettings, "fresh")
@option(JobSettings, "update")
@click.option(
    "--max-errors",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Exit with 3 above this share of errors.",
)
@option(Execution, "runner")
@option(Execution, "address", "--ray-address", "ray_address", default="none")
@option(Execution, "actors", default=AUTO)
@option(ScoreRequest, "scene_pattern")
@click.version_option(package_name="planes")
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Score images with registered models: instance table, COCO results, overlays, metrics, MLflow run.

    Exit code 0: scored; 3: more images failed than --max-errors allows.
    """
    if context.invoked_subcommand:
        return
    if not options["models"]:
        raise click.UsageError("give at least one --model, such as --model planes-det/Production")
    if not options["data"]:
        raise click.UsageError("give --data: a folder, a COCO JSON, an image or a quoted glob")
    if options["update"] and options["fresh"]:
        raise click.UsageError("--update keeps what --fresh throws away; give one of them")
    from pipelines.steps.cli_support import friendly

    friendly(_score)(**options)


@main.command(reports=True, examples=("score evaluate predictions/planes-inst-1/kaggle.csv --data data/airfield",))
@click.argument("predictions", shell_complete=files)
@click.option("--data", required=True, shell_complete=files, help="Data set with ground truth over the same images.")
@option(ScoreRequest, "split")
@option(JobSettings, "score_threshold", type=click.FloatRange(0, 1), help="Least score that counts.")
@RLE
@CATEGORY
def evaluate(predictions: str, data: str, **options: Any) -> None:
    """Evaluate a file of PREDICTIONS, an instances.parquet or a Kaggle CSV, against ground truth."""
    from pipelines.steps.cli_support import friendly

    friendly(_evaluate)(predictions, data, **options)


@main.command(
    headings={
        "Output": ("formats", "out", "score_threshold", "overlays", "rle", "geojson"),
        "Map layers": ("crs", "dedupe", "time_pattern"),
    },
    examples=("score export predictions/planes-inst-1 --to geojson,overlays",),
    reports=True,
)
@click.argument("folder", shell_complete=files)
@click.option(
    "--to",
    "formats",
    default="coco",
    show_default=True,
    help="coco, kaggle, geojson, overlays; or one map layer of all images: geopackage, geoparquet. Several with commas.",
)
@click.option("--out", default=None, shell_complete=files, help="Folder to write to; the scoring's own without it.")
@option(
    JobSettings,
    "score_threshold",
    type=click.FloatRange(0, 1),
    default=None,
    help="Least score; without it all, and for kaggle from the version's suggested one on.",
)
@option(JobSettings, "overlays", type=click.IntRange(1))
@RLE
@GEOJSON
@option(LayerSettings, "crs")
@option(LayerSettings, "dedupe")
@option(LayerSettings, "time_pattern")
def export(folder: str, formats: str, out: str | None, **options: Any) -> None:
    """Make files from the table that a scoring left in FOLDER, such as predictions/planes-det-3."""
    from pipelines.steps.cli_support import friendly

    friendly(_export)(folder, formats, out=out, **options)


@main.command(examples=("score view predictions/planes-inst-1 --data data/airfield",))
@click.argument("folder", shell_complete=files)
@click.option(
    "--data",
    default=None,
    shell_complete=files,
    help="Data set with ground truth over the same images: errors are shown, and come first.",
)
@option(ScoreRequest, "split")
@click.option("--port", default=0, show_default="any that is free", type=click.IntRange(0, 65_535), help="Of this machine.")
@click.option("--open/--no-open", "browser", default=True, show_default=True, help="Open a browser.")
def view(folder: str, **options: Any) -> None:
    """Look at what a scoring left in FOLDER: its images with boxes and outlines, in a browser, until Ctrl-C.

    The page is served on this machine's own address alone, and needs no network.
    """
    from pipelines.steps.cli_support import friendly

    friendly(_view)(folder, **options)


@main.command(reports=True, examples=("score compare planes-inst/latest planes-mask/latest --data data/airfield",))
@click.argument("targets", nargs=-1, required=True, shell_complete=files)
@option(ComparisonRequest, "data")
@option(ComparisonRequest, "split")
@option(ComparisonRequest, "out")
@option(ComparisonRequest, "device")
@option(ComparisonRequest, "score_threshold", type=click.FloatRange(0, 1))
@CATEGORY
def compare(targets: tuple[str, ...], **options: Any) -> None:
    """Compare TARGETS over the same images: scoring runs (MLflow run ids), versions, or files of predictions.

    The first is what the others are held against. Leaves one HTML page with tables,
    curves, errors, intervals and pictures, and an MLflow run.
    """
    from pipelines.steps.cli_support import friendly

    names = tuple(name for target in targets for name in target.split())
    friendly(_compare)(names, options)


def _score(models: tuple[str, ...], data: str, *, out: str, split: str, device: str, **options: Any) -> None:
    from pipelines.start_up import importing

    with importing():
        from pipelines.data.readers.opening import check_exists
        from scoring.jobs.job import claim_folder

        # A mistake in a name is reported before the libraries are loaded.
        check_exists(data)
        if "://" not in out:
            claim_folder(Path(out))

        from pipelines.registry.model_versions import Registry
        from scoring.use_cases import NotLogged, score

    address = None if options["ray_address"] == "none" else options["ray_address"]
    actors, most = _actors(options)
    execution = Execution(runner=options["runner"], address=address, actors=actors, most_actors=most)
    settings = JobSettings(
        batch_size=_auto("batch", options),
        score_threshold=DEFAULT_THRESHOLD if options["score_threshold"] == AUTO else _share(options["score_threshold"]),
        overlays=options["overlays"],
        rle=options["rle"],
        geojson=options["geojson"],
        tiling=_tiling(options),
        shard_size=options["shard"],
        part_size=options["part_size"],
        workers=_auto("workers", options),
        fresh=options["fresh"],
        update=options["update"],
        precision=options["precision"],
        value_range=None if options["value_range"] == VERSION else options["value_range"],
        bands=None if options["bands"] == VERSION else options["bands"],
    )
    request = ScoreRequest(
        models=models,
        data=data,
        out=out,
        split=split,
        scene_pattern=options["scene_pattern"],
        device=device,
        auto_threshold=options["score_threshold"] == AUTO,
        settings=settings,
        execution=execution,
        runtime=options["runtime"],
    )
    try:
        jobs = score(Registry.connect(), request, _display())
    except NotLogged as error:
        record(jobs=[job.facts for job in error.jobs])
        raise
    record(jobs=[job.facts for job in jobs])
    worst = max(job.failures / (job.images + job.failures) for job in jobs)
    if worst > options["max_errors"]:
        reason = f"{worst:.1%} of the images failed, more than --max-errors allows"
        click.echo(f"Error: {reason}", err=True)
        end(MANY_ERRORS, reason)


def _tiling(options: Mapping[str, Any]) -> dict[str, object]:
    """What the options change of the versions' tiling."""
    kinds = {"tile": ("size", int), "tile_overlap": ("overlap", float), "merge": ("merge", str), "match": ("match", str)}
    kinds |= {"merge_threshold": ("threshold", float), "full_image": ("full_image_size", int), "turns": ("turns", int)}
    changes: dict[str, object] = {}
    for name, (key, kind) in kinds.items():
        text = options[name]
        if text == "none" and name in ("tile", "full_image"):
            changes[key] = 0 if name == "tile" else None
        elif text != VERSION:
            changes[key] = _number(name, text, kind)
    return changes


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise click.UsageError(f"--score-threshold {text}: expected a number from 0 to 1, or auto")
    return value


def _actors(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """How many actors, and how many at most where their number may grow: ``4``, ``2-8`` or ``auto``."""
    least, sign, most = options["actors"].partition("-")
    if not (sign and least):
        return _auto("actors", options), None
    numbers = [int(text) if text.isdecimal() else 0 for text in (least, most)]
    if not 1 <= numbers[0] <= numbers[1]:
        raise click.UsageError(f"--actors {options['actors']}: expected a range such as 2-8")
    return numbers[0], numbers[1]


def _auto(option: str, options: Mapping[str, Any]) -> int | None:
    """A whole number from 1, None for ``auto``."""
    text = options[option]
    if text == "auto":
        return None
    number = _number(option, text, int)
    if number < 1:
        raise click.UsageError(f"--{option} {text}: expected 1 or more, or auto")
    return number


def _number(option: str, text: str, kind: Callable[[str], N]) -> N:
    try:
        return kind(text)
    except ValueError as error:
        name = f"--{option.replace('_', '-')}"
        raise click.UsageError(f"{name} {text}: expected {'a whole number' if kind is int else 'a number'}") from error


def _compare(names: tuple[str, ...], options: dict[str, Any]) -> None:
    from pipelines.registry.model_versions import Registry
    from scoring.jobs.job import claim_folder
    from scoring.use_cases import compare_targets

    claim_folder(Path(options["out"]))
    found = compare_targets(Registry.connect(), ComparisonRequest(targets=names, **options), _display())
    record(**found.facts)


def _display() -> Any:
    """Bars and lines that count failed images."""
    from pipelines.steps.cli_support import TERMINAL, show_progress
    from scoring.reader import Failure

    return replace(TERMINAL, items=partial(show_progress, failed=lambda scored: isinstance(scored[2], Failure)))


def _export(folder: str, formats: str, *, out: str | None, score_threshold: float | None, **options: Any) -> None:
    from scoring.jobs.export import FORMATS, LAYERS, export_job

    wanted = formats.split(",")
    unknown = [name for name in wanted if name not in (*FORMATS, *LAYERS)]
    if unknown:
        raise click.UsageError(f"--to {unknown[0]}: expected some of {', '.join((*FORMATS, *LAYERS))}")
    target = Path(out or folder)
    planes = export_job(
        Path(folder),
        target,
        wanted,
        score_threshold=score_threshold,
        rle=options["rle"],
        form=options["geojson"],
        most=options["overlays"],
        settings=LayerSettings(**{name: options[name] for name in ("crs", "dedupe", "time_pattern")}),
    )
    click.echo(f"{planes} planes to {target}: {', '.join(wanted)}")
    record(folder=target, formats=wanted, planes=planes)


def _view(folder: str, *, data: str | None, split: str, port: int, browser: bool) -> None:
    import webbrowser

    from models.errors import OutputError
    from scoring.viewer.content import Job
    from scoring.viewer.server import HOST, serve

    job = Job(Path(folder), data, split)
    try:
        server = serve(job, port)
    except OSError as error:
        raise OutputError(f"--port {port}: is taken ({error.strerror}); give another, or none") from error
    address = f"http://{HOST}:{server.server_port}"
    click.echo(f"{job.manifest.label}: {len(job.samples)} images at {address} (Ctrl-C ends)")
    if browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo()
    finally:
        server.server_close()


def _evaluate(predictions: str, data: str, *, split: str, score_threshold: float, rle: Any, category: str) -> None:
    from pipelines.data.readers.opening import open_dataset
    from pipelines.evaluation.categories import PLANE
    from pipelines.evaluation.metrics import coco_tables
    from scoring.comparison.evaluate_file import category_of_file, evaluate_file

    known = category_of_file(Path(predictions)) or PLANE
    dataset = open_dataset(data, split, category=known if category == AUTO else category, keep=True)
    evaluations = evaluate_file(Path(predictions), dataset, score_threshold=score_threshold, convention=rle)
    for evaluation in evaluations:
        click.echo(coco_tables(evaluation))
    record(
        predictions=predictions,
        data=f"{dataset.name}/{dataset.split}",
        images=len(dataset),
        images_failed=evaluations[0].settings["images_failed"],
        metrics={k: v for e in evaluations for k, v in e.finite("mask_" * (e.settings["kind"] == "segm")).items()},
    )


if __name__ == "__main__":
    main()
