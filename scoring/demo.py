"""Entry point ``main``: the whole line once, from an empty folder to scored images."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from pipelines.steps.cli_support import friendly, stage


@click.command()
@click.option("--data", default="data/airfield", show_default=True, help="Data set; made where it does not exist.")
@click.option("--out", default="predictions", show_default=True, help="Folder for the outputs of scoring.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@friendly
def main(data: str, out: str, device: str) -> None:
    """Make data, train a U-Net and a detector, compose them, register and promote all three, score the test set.

    What a second run finds done (data, equal trainings, promotions) it reuses.
    """
    begin = time.monotonic()
    # Under `mlflow run` the given run becomes the parent of the steps' runs.
    parent = os.environ.pop("MLFLOW_RUN_ID", None)
    if parent:
        os.environ["PLANES_PARENT_RUN_ID"] = parent
    from pipelines.steps.prepare_data import prepare

    with stage("1/6 data"):
        if Path(data).exists() and not (Path(data) / "airfield.json").exists():
            click.echo(f"{data}: taken as it is")
        else:
            prepare(data)
    trained = [_train("unet", "demo_unet", "planes-unet", "2/6 U-Net", data, device)]
    trained.append(_train("detector", "demo_detector", "planes-det", "3/6 detector", data, device))
    from pipelines.steps.compose import ComposeRequest, compose
    from pipelines.steps.promote import PromotionRequest, promote

    unet, detector = (f"{one.name}/{one.version}" for one in trained)
    with stage("4/6 composition"):
        composed = compose(ComposeRequest(detector, unet, "planes-inst", data, "exclusive", 0.0, device, reuse=True))
    with stage("5/6 promotion"):
        for version in (unet, detector, composed):
            promote(PromotionRequest(version, "production", (data,), "test", device))
    with stage("6/6 scoring"):
        from scoring.cli import main as score

        models = ["--model", "planes-inst/Production"]
        score.main([*models, "--data", data, "--out", out], standalone_mode=False)
    _summary(trained, time.monotonic() - begin)


def _train(task: str, recipe: str, name: str, title: str, data: str, device: str):  # type: ignore[no-untyped-def]
    from pipelines.steps.options import TrainingRequest
    from pipelines.steps.training import report, train_and_register

    with stage(title):
        trained = train_and_register(TrainingRequest(task, recipe, data, name, device, (), reuse=True))
        report(trained)
    return trained


def _summary(trained, seconds: float) -> None:  # type: ignore[no-untyped-def]
    click.echo("\nTest metrics of the versions (COCO AP of boxes at score >= 0.05; IoU of masks in true boxes):")
    for one in trained:
        shown = {k: v for k, v in one.metrics.items() if k in ("AP", "AP50", "AP75", "AR100", "IoU", "Dice")}
        numbers = "  ".join(f"{k} {v:.3f}" for k, v in shown.items())
        click.echo(f"  {one.name}/{one.version:<4} {numbers}{'  (reused)' if one.reused else ''}")
    click.echo(f"All done in {seconds:.0f} s.")


if __name__ == "__main__":
    main()
