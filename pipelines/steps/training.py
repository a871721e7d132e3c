"""What both training entry points share: options, run, evaluation, figures, registration."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import mlflow
import numpy as np

import models
from models.errors import DataError
from models.geometry import crop_window
from models.instances import Instances
from models.predictor import load_model
from models.pyfunc import code_digest
from models.torch_tools import pick_device
from pipelines import figures, registry, tracking
from pipelines.data.dataset import Dataset, Sample, split_by_scene
from pipelines.data.opening import open_dataset
from pipelines.evaluation import Evaluation, instance_ious
from pipelines.prediction import MAIN_METRIC, evaluate_predictions, is_segmenter, predict_image
from pipelines.recipe import DetectorRecipe, UNetRecipe, load_recipe
from pipelines.steps.edge import ProgressListener, split_overrides
from pipelines.training.detector import train_detector
from pipelines.training.loop import Outcome
from pipelines.training.unet import train_unet

AS_RECIPE = "recipe"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class TrainingRequest:
    """What a training command was asked for."""

    task: str
    recipe: str
    data: str
    register_as: str
    device: str
    overrides: tuple[str, ...]
    work_dir: str
    reuse: bool
    fresh: bool


@dataclass(frozen=True)
class Trained:
    """The registered version, its test metrics, and the run that made it."""

    name: str
    version: str
    run_id: str
    metrics: dict[str, float]
    reused: bool = False


def training_options(recipe: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """click options of a training entry point with its default recipe and registered name."""
    options = [
        click.option("--recipe", default=recipe, show_default=True, help="Recipe name or path of a YAML file."),
        click.option("--data", default="data/airfield", show_default=True, help="Data folder, COCO JSON or course JSON."),
        click.option("--name", default=name, show_default=True, help="Registered model to add a version to."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--steps", default=AS_RECIPE, show_default=True, help="Training steps."),
        click.option("--epochs", default=AS_RECIPE, show_default=True, help="Epochs, instead of steps."),
        click.option("--batch-size", default=AS_RECIPE, show_default=True, help="Examples per step."),
        click.option("--lr", default=AS_RECIPE, show_default=True, help="Learning rate."),
        click.option("--seed", default=AS_RECIPE, show_default=True, help="Seed of weights, data order and augmentation."),
        click.option("--weights", default=AS_RECIPE, show_default=True, help="none, a library's weight name, or a path."),
        click.option("--set", "overrides", multiple=True, help="section.key=value of the recipe; repeatable."),
        click.option("--work-dir", default=".planes/training", show_default=True, help="Where checkpoints are kept."),
        click.option("--reuse/--no-reuse", default=False, help="Take the version of an equal training, if there is one."),
        click.option("--fresh", is_flag=True, help="Throw away an unfinished equal training instead of going on."),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def request_from(task: str, options: dict[str, Any]) -> TrainingRequest:
    """Collect command line options; named ones become overrides of the recipe."""
    places = {
        "steps": "training.steps",
        "epochs": "training.epochs",
        "batch_size": "training.batch_size",
        "lr": "optimizer.lr",
        "seed": "training.seed",
        "weights": "weights",
    }
    named = [f"{place}={options[key]}" for key, place in places.items() if str(options[key]) != AS_RECIPE]
    if str(options["steps"]) != AS_RECIPE and str(options["epochs"]) == AS_RECIPE:
        named.append("training.epochs=null")
    return TrainingRequest(
        task,
        options["recipe"],
        options["data"],
        options["name"],
        options["device"],
        (*split_overrides(options["overrides"]), *named),
        options["work_dir"],
        options["reuse"],
        options["fresh"],
    )


def train_and_register(request: TrainingRequest) -> Trained:
    """Train (or resume, or reuse), evaluate, log and register.

    Raises:
        PlanesError: recipe, data, weights or store that cannot be used.
    """
    recipe = load_recipe(request.recipe, request.overrides, request.task)
    device = pick_device(request.device)
    train, val, test = _data(request, recipe)
    tracking.connect()
    key = recipe.key(train.digest(), val.digest() if val else "", _code_digest())
    known = registry.find_trained(request.register_as, key) if request.reuse else None
    if known is not None:
        click.echo(f"{request.register_as}: version {known.version} has this recipe, data and code; reused")
        metrics = json.loads(known.tags.get("metrics", "{}"))
        return Trained(request.register_as, str(known.version), str(known.run_id), metrics, reused=True)
    folder = Path(request.work_dir) / f"{request.register_as}-{key}"
    if request.fresh or (folder / "registered").exists():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return _train_in(folder, request, recipe, device, key, (train, val, test))


def _data(request: TrainingRequest, recipe: DetectorRecipe | UNetRecipe) -> tuple[Dataset, Dataset | None, Dataset | None]:
    where, settings = request.data, recipe.data
    full = open_dataset(where, "train", settings.category, settings.scene_pattern)
    click.echo(full.summary())
    if not full.has_truth or not full.planes:
        raise DataError(f"{where}: no annotated planes to train on (expected train_coco.json or train.json)")
    train, val = split_by_scene(full, settings.val_fraction, recipe.training.seed)
    test = None
    if Path(where).is_dir():
        try:
            test = open_dataset(where, "test", settings.category, settings.scene_pattern)
        except DataError as error:
            click.echo(f"no test set: {error}")
        if test is not None and not test.has_truth:
            click.echo("no test metrics: the test images have no ground truth")
            test = None
    return train, val if len(val) else None, test


def _code_digest() -> str:
    root = Path(models.__file__).parents[1]
    return code_digest(root / "models") + code_digest(root / "pipelines")


def _train_in(
    folder: Path,
    request: TrainingRequest,
    recipe: DetectorRecipe | UNetRecipe,
    device: str,
    key: str,
    data: tuple[Dataset, Dataset | None, Dataset | None],
) -> Trained:
    train, val, test = data
    noted = folder / RUN_FILE
    earlier = json.loads(noted.read_text())["run_id"] if noted.exists() else None
    tags = {"task": request.task, "recipe": request.recipe, "training_key": key, "registered_as": request.register_as}
    title = f"{request.register_as} {request.recipe}"
    with tracking.tracked_run(title, tags, earlier, system_metrics=True) as run:
        run_id = run.info.run_id
        if earlier and earlier != run_id:
            mlflow.set_tag("resumed_from", earlier)
        noted.write_text(json.dumps({"run_id": run_id}))
        tracking.log_params({**recipe.flat(), "device": device, "data": request.data, "data_digest": train.digest()})
        mlflow.log_dict(recipe.model_dump(), "recipe.yaml")
        tracking.log_environment()
        for dataset, context in ((train, "training"), (val, "validation"), (test, "test")):
            if dataset is not None:
                tracking.log_dataset(dataset, context)
        progress = ProgressListener(request.register_as)
        started = time.monotonic()
        try:
            listeners = (tracking.MlflowListener(run_id), progress)
            if isinstance(recipe, DetectorRecipe):
                saved, outcome = train_detector(recipe, train, val, folder, device, listeners)
            else:
                saved, outcome = train_unet(recipe, train, val, folder, device, listeners)
        except KeyboardInterrupt:
            click.echo("\nStopped; the same command goes on from this step.", err=True)
            raise
        finally:
            progress.close()
        mlflow.log_metrics({"wall_seconds": time.monotonic() - started, "best_step": outcome.step})
        mlflow.log_figure(figures.loss_figure(outcome.history, title), "figures/loss.png")
        trained = _publish(request, saved, outcome, key, data, run_id, device)
    (folder / "registered").write_text(trained.version)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return trained


def _publish(
    request: TrainingRequest,
    saved: Path,
    outcome: Outcome,
    key: str,
    data: tuple[Dataset, Dataset | None, Dataset | None],
    run_id: str,
    device: str,
) -> Trained:
    """Evaluate the saved folder on validation and test, register it, log metrics linked to the version."""
    train, val, test = data
    results: list[tuple[str, Evaluation, Dataset]] = []
    for dataset, prefix in ((val, "val/best_"), (test, "test/")):
        if dataset is not None:
            evaluations, sheet = evaluate_with_sheet(saved, dataset, device)
            results += [(prefix + p, e, dataset) for p, e in evaluations]
            mlflow.log_image(sheet, f"figures/{dataset.split}_samples.png")
    metrics = {p.removeprefix("test/") + k: v for p, e, d in results if d is test for k, v in e.finite().items()}
    tags = {
        **tracking.source_tags(),
        "training_key": key,
        "recipe": request.recipe,
        "data": f"{train.name}/{train.split}",
        "data_digest": train.digest(),
        "test_digest": test.digest() if test else "none",
        "metrics": json.dumps({k: round(v, 4) for k, v in metrics.items()}),
        "weights_sha256": hashlib.sha256((saved / "weights.safetensors").read_bytes()).hexdigest(),
        "engine": json.loads((saved / "model.json").read_text())["engine"],
    }
    version, model_id = registry.log_and_register(saved, request.register_as, _example(request.task, train), tags, run_id)
    for prefix, evaluation, dataset in results:
        tracking.log_evaluation(prefix, evaluation, dataset, model_id)
    mlflow.set_tag("version", f"{request.register_as}/{version.version}")
    return Trained(request.register_as, str(version.version), run_id, metrics)


def _example(task: str, train: Dataset) -> np.ndarray:
    """A small input: a plane's crop for a segmenter, a corner with a plane for a detector."""
    sample = next(s for s in train.samples if len(s.boxes))
    x1, y1, x2, y2 = crop_window(sample.boxes[0], sample.height, sample.width, 0.0 if task == "unet" else 0.5)
    return sample.read()[y1:y2, x1:x2]


def evaluate_with_sheet(
    saved: Path, dataset: Dataset, device: str, samples: int = 3
) -> tuple[list[tuple[str, Evaluation]], np.ndarray]:
    """Predict a data set with a saved folder: its evaluations, and a sheet of the first samples."""
    predictor = load_model(saved, device)
    shown: list[tuple[np.ndarray, Sample, Instances]] = []
    predictions = []
    for sample in dataset.samples:
        image = sample.read()
        found = predict_image(predictor, image, sample)
        predictions.append(found)
        if len(shown) < samples and len(sample.boxes):
            shown.append((image, sample, found))
    segmenter = is_segmenter(predictor)
    evaluations = evaluate_predictions(predictions, dataset, segmenter)
    return evaluations, _crops(shown) if segmenter else figures.image_sheet(shown)


def _crops(shown: Sequence[tuple[np.ndarray, Sample, Instances]], most: int = 12) -> np.ndarray:
    rows = []
    for image, sample, found in shown:
        if not sample.has_masks or found.masks is None:
            continue
        one = Dataset("", sample.path, "", "", (sample,))
        for box, truth, guess, iou in zip(
            sample.boxes, sample.masks, found.masks, instance_ious(one, [found.masks]), strict=False
        ):
            rows.append((image, box, truth, guess, float(iou)))
    return figures.crop_sheet(rows[:most])


def report(trained: Trained, kind: str) -> None:
    """Say in one line what came out."""
    metric = MAIN_METRIC[kind]
    value = trained.metrics.get(metric)
    shown = f"test {metric} {value:.3f}" if value is not None else "no test set"
    click.echo(f"{trained.name} version {trained.version}: {shown} (run {trained.run_id})")
