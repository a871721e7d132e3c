"""The ``score`` command. Imports of ours stay inside the commands: ``--help`` must answer at once."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option(
    "--model",
    "models",
    multiple=True,
    help="NAME/VERSION, NAME/ALIAS, NAME@ALIAS, models:/..., or a saved folder; repeatable.",
)
@click.option("--data", help="Folder, COCO JSON, course JSON, image or quoted glob.")
@click.option("--out", default="predictions", show_default=True, help="Folder for the outputs.")
@click.option("--split", default="test", show_default=True, help="Split to take where --data is a data set folder.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Images per forward pass.")
@click.option(
    "--score-threshold", default=0.05, show_default=True, type=click.FloatRange(0, 1), help="Least score that is kept."
)
@click.option("--overlays", default=3, show_default=True, type=click.IntRange(0), help="Pictures to draw.")
@click.option("--scene-pattern", default=None, help="Regular expression whose first group is an image's scene.")
@click.version_option(package_name="planes")
@click.pass_context
def main(context: click.Context, **options) -> None:  # type: ignore[no-untyped-def]
    """Score images with registered models: instance table, COCO results, overlays, metrics, MLflow run.

    \b
    score --model planes-det/Production --data data/airfield --out predictions
    score --model planes-det/2 --model planes-det/3 --data test_coco.json --out both
    score compare RUN_ID RUN_ID
    """
    if context.invoked_subcommand:
        return
    if not options["models"]:
        raise click.UsageError("give at least one --model, such as --model planes-det/Production")
    if not options["data"]:
        raise click.UsageError("give --data: a folder, a COCO JSON, an image or a quoted glob")
    from pipelines.steps.edge import friendly

    friendly(_score)(**options)


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--out", default=None, help="Also write the table to this CSV file.")
def compare(runs: tuple[str, ...], out: str | None) -> None:
    """Compare past scoring RUNS (MLflow run ids) over the same images in one table."""
    from pipelines.steps.edge import friendly

    friendly(_compare)(runs, out)


def _score(models: tuple[str, ...], data: str, out: str, split: str, device: str, **options) -> None:  # type: ignore[no-untyped-def]
    from pathlib import Path

    from pipelines.data.opening import open_dataset
    from scoring.job import JobSettings, claim_folder

    dataset = open_dataset(data, split, scene_pattern=options["scene_pattern"])
    claim_folder(Path(out))

    from models.torch_tools import pick_device
    from pipelines import registry, tracking

    uri = tracking.connect()
    device = pick_device(device)
    resolved = [registry.resolve(text) for text in dict.fromkeys(models)]
    click.echo(dataset.summary())
    settings = JobSettings(options["batch"], options["score_threshold"], options["overlays"])
    runs = [_score_one(version, dataset, Path(out), settings, device) for version in resolved]
    _show(runs, Path(out), uri)


def _score_one(version, dataset, out, settings, device):  # type: ignore[no-untyped-def]
    """Run one job, log it, and say what it left."""
    from models.predictor import load_model
    from pipelines import registry
    from pipelines.evaluation import coco_tables
    from pipelines.steps.edge import show_progress
    from scoring import track
    from scoring.compare import Scored
    from scoring.job import run_job

    predictor = load_model(registry.fetch(version), device)
    job = run_job(predictor, version.label, dataset, out, settings, show_progress)
    params = {**settings.__dict__, "device": device, "data": str(dataset.source)}
    run_id = track.log_job(job, version, dataset, params)
    errors = f", {len(job.failures)} unreadable (see errors.parquet)" if job.failures else ""
    click.echo(f"{job.label}: {job.instances} planes in {job.images} images{errors}, {job.seconds:.1f} s, run {run_id}")
    click.echo(f"   outputs in {job.folder}")
    for _, evaluation in job.evaluations:
        if "max_dets" in evaluation.settings:
            click.echo(coco_tables(evaluation))
    return Scored(job.label, f"{dataset.name}/{dataset.split}", dataset.digest(), job.metrics, job.images, job.seconds)


def _show(runs, out, uri) -> None:  # type: ignore[no-untyped-def]
    from pipelines.tracking import ui_command
    from scoring import track
    from scoring.compare import comparison_table, render

    table = comparison_table(runs)
    click.echo(render(table))
    if len(runs) > 1:
        table.to_csv(out / "comparison.csv", index=False)
        track.log_comparison(out / "comparison.csv", [r.label for r in runs])
    click.echo(f"MLflow UI: {ui_command(uri)}")


def _compare(runs: tuple[str, ...], out: str | None) -> None:
    from models.errors import OutputError
    from pipelines import tracking
    from scoring import track
    from scoring.compare import comparison_table, render

    tracking.connect()
    table = comparison_table([track.load_scored(run) for run in runs])
    click.echo(render(table))
    if out:
        try:
            table.to_csv(out, index=False)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    main()
