"""Entry point ``compose``: a detector version and a segmenter version become an instance segmenter version."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.options import WORK_DIR


@dataclass(frozen=True)
class ComposeRequest:
    """What the command was asked for."""

    detector: str
    segmenter: str
    name: str
    data: str
    overlaps: Literal["exclusive", "keep"]
    min_score: float
    device: str
    reuse: bool = False


@click.command()
@click.option("--detector", default="planes-det/latest", show_default=True, help="NAME/VERSION, NAME/ALIAS or a folder.")
@click.option("--segmenter", default="planes-unet/latest", show_default=True, help="NAME/VERSION, NAME/ALIAS or a folder.")
@click.option("--name", default="planes-inst", show_default=True, help="Registered model to add a version to.")
@click.option("--data", default="data/airfield", show_default=True, help="Data to evaluate on; its test split is used.")
@click.option(
    "--overlaps",
    default="exclusive",
    show_default=True,
    type=click.Choice(["exclusive", "keep"]),
    help="exclusive: a pixel belongs to the plane of the higher score.",
)
@click.option("--min-score", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Least score to segment.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--reuse/--no-reuse", default=False, help="Take the version of an equal composition, if there is one.")
@friendly
def main(**options: Any) -> None:
    """Compose planes-det and planes-unet into planes-inst, evaluate, log and register it.

    The version holds both parts and loads alone; its tags name the versions they came from.
    """
    compose(ComposeRequest(**options))


def compose(request: ComposeRequest) -> str:
    """Compose, evaluate on the test split where there is one, register; returns ``name/version``.

    Raises:
        PlanesError: parts, data or store that cannot be used.
    """
    from models.engines.composed import ComposedArchitecture, save_composed
    from models.runtime.devices import pick_device
    from models.saved.spec import read_spec
    from pipelines.data.readers.opening import open_dataset
    from pipelines.registry import model_versions
    from pipelines.steps.publishing import Publication, example_image, publish
    from pipelines.steps.training import open_test, source_digest
    from pipelines.tracking import mlflow_runs

    uri = mlflow_runs.connect()
    parts = {"detector": model_versions.resolve(request.detector), "segmenter": model_versions.resolve(request.segmenter)}
    named = {role: part.label for role, part in parts.items()}
    folders = {role: model_versions.fetch(part) for role, part in parts.items()}
    category = read_spec(folders["detector"]).classes[0]
    test = open_test(request.data, category, None)
    key = _key(request, named, test.digest() if test else "", source_digest())
    known = model_versions.find_trained(request.name, key) if request.reuse else None
    if known is not None:
        click.echo(f"{request.name}: version {known.version} is this composition; reused")
        return f"{request.name}/{known.version}"
    device = pick_device(request.device)
    architecture = ComposedArchitecture(overlaps=request.overlaps, min_score=request.min_score)
    Path(WORK_DIR).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_DIR) as work:
        saved = save_composed(Path(work) / "model", folders["detector"], folders["segmenter"], architecture, named)
        title = f"{request.name} {named['detector']} + {named['segmenter']}"
        with mlflow_runs.tracked_run(title, {"task": "compose", **named}) as run:
            mlflow_runs.log_params({**request.__dict__, **named, "device": device})
            for part in parts.values():
                mlflow_runs.link_model(part.model_id)
            if test is not None:
                mlflow_runs.log_dataset(test, "test")
            example_from = (test or open_dataset(request.data, "train", category)).rendered(read_spec(saved).rendering)
            tags = {**named, "training_key": key}
            example, known_images = example_image("detector", example_from), _training_images(parts)
            what = Publication(saved, request.name, example, test=test, tags=tags, trained_on=known_images)
            version, metrics = publish(what, run.info.run_id, device)
    value = f"test mask_AP {metrics['mask_AP']:.3f}" if "mask_AP" in metrics else "no test set with outlines"
    click.echo(f"{request.name} version {version} from {named['detector']} and {named['segmenter']}: {value}")
    click.echo(f"MLflow UI: {mlflow_runs.ui_link(uri, run.info.run_id)}")
    return f"{request.name}/{version}"


def _training_images(parts: dict[str, Any]) -> Any:
    """What both parts were trained on."""
    from pipelines.registry.lineage import read_training_images
    from pipelines.registry.training_images import united

    return united({f"{role} {part.label}": read_training_images(part) for role, part in parts.items()})


def _key(request: ComposeRequest, named: dict[str, str], *more: str) -> str:
    """Digest of parts, settings, test data and code: what makes two compositions equal."""
    content = [sorted(named.items()), request.overlaps, request.min_score, *more]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
