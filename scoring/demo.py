"""Entry point ``main``: the whole line once, from an empty folder to scored images. ``--help`` loads no libraries."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.start_up import importing
from pipelines.steps.cli_support import TERMINAL, friendly, stage
from pipelines.steps.commands import Command
from pipelines.steps.options import AS_RECIPE
from pipelines.steps.prepare_data import prepare
from pipelines.use_cases.requests import ComposeRequest, PromotionRequest, TrainingRequest
from scoring.cli import main as score

if TYPE_CHECKING:
    from pipelines.registry.model_versions import Registry
    from pipelines.use_cases.training import Trained


@click.command(cls=Command, env="PLANES_DEMO", examples=("planes demo --steps 4",))
@click.option("--data", default="data/airfield", show_default=True, help="Data set; made where it does not exist.")
@click.option("--out", default="predictions", show_default=True, help="Folder for the outputs of scoring.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--steps", default=AS_RECIPE, show_default=True, help="Steps of both trainings; overrules the gates.")
@friendly
def main(*, data: str, out: str, device: str, steps: str) -> None:
    """Make data, train a U-Net and a detector, compose them, register and promote all three, score the test set.

    What a second run finds done (data, equal trainings, promotions) it reuses.
    """
    begin = time.monotonic()
    with importing():
        from pipelines.registry.model_versions import Registry
        from pipelines.use_cases.compose import compose
        from pipelines.use_cases.promote import promote
    # Under `mlflow run` the given run becomes the parent of the steps' runs.
    parent = os.environ.pop("MLFLOW_RUN_ID", None)
    if parent:
        os.environ["PLANES_PARENT_RUN_ID"] = parent
    with stage("1/6 data"):
        if Path(data).exists() and not (Path(data) / "airfield.json").exists():
            click.echo(f"{data}: taken as it is")
        else:
            prepare(data)
    registry = Registry.connect()
    overrides = () if steps == AS_RECIPE else (f"steps={steps}",)
    trained = []
    for task, name, title in (("unet", "planes-unet", "2/6 U-Net"), ("detector", "planes-det", "3/6 detector")):
        training = TrainingRequest(
            task=task,
            recipe=f"demo_{task}",
            data=data,
            register_as=name,
            device=device,
            overrides=overrides,
            reuse=True,
        )
        trained.append(_train(registry, training, title))
    unet, detector = (f"{one.name}/{one.version}" for one in trained)
    request = ComposeRequest(detector=detector, segmenter=unet, name="planes-inst", data=data, device=device, reuse=True)
    with stage("4/6 composition"):
        composed = compose(registry, request)
    with stage("5/6 promotion"):
        for version in (unet, detector, composed):
            # A few steps teach nothing that gates would let pass.
            promotion = PromotionRequest(
                model=version,
                data=(data,),
                split="test",
                device=device,
                force=bool(overrides),
                reason=f"a short run of the demo, --steps {steps}" if overrides else "",
            )
            promote(registry, promotion, TERMINAL)
    with stage("6/6 scoring"):
        models = ["--model", "planes-inst/Production"]
        score.main([*models, "--data", data, "--out", out], standalone_mode=False)
    _summary(trained, time.monotonic() - begin)


def _train(registry: Registry, request: TrainingRequest, title: str) -> Trained:
    from pipelines.steps.training import report
    from pipelines.use_cases.training import train

    with stage(title):
        trained = train(registry, request, TERMINAL)
        report(registry, trained)
    return trained


def _summary(trained: Sequence[Trained], seconds: float) -> None:
    click.echo("\nTest metrics of the versions (COCO AP of boxes at score >= 0.05; IoU of masks in true boxes):")
    for one in trained:
        shown = {k: v for k, v in one.metrics.items() if k in ("AP", "AP50", "AP75", "AR100", "IoU", "Dice")}
        numbers = "  ".join(f"{k} {v:.3f}" for k, v in shown.items())
        click.echo(f"  {one.name}/{one.version:<4} {numbers}{'  (reused)' if one.reused else ''}")
    click.echo(f"All done in {seconds:.0f} s.")


if __name__ == "__main__":
    main()
