"""A training from request to registered version: plan, run, evaluation, figures, registration."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow

import models
from models.engines.detectron2.predictor import require_detectron2
from models.errors import DataError, OutputError
from models.pyfunc import code_digest
from models.runtime.devices import pick_device, pick_precision
from models.saved.scores import Scores
from pipelines.data.dataset import Dataset, split_by_scene
from pipelines.data.loading.tiles import cache_folder, cached_tiles, cut_tiles
from pipelines.data.loading.unreadable import Unreadable
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation import figures
from pipelines.files import clear_temporaries, write_whole
from pipelines.locking import held, lock_of
from pipelines.recipes.reading import load_recipe
from pipelines.recipes.settings import Detectron2Recipe, Recipe, UNetRecipe
from pipelines.registry.model_versions import Registry
from pipelines.registry.registration import check_name
from pipelines.registry.training_images import TrainingImages, images_of, united
from pipelines.tracking import mlflow_runs
from pipelines.training.anchors import with_anchors
from pipelines.training.detector import train_detector
from pipelines.training.group import check_processes
from pipelines.training.inputs import Inputs, find_earlier, write_inputs
from pipelines.training.loop import Listener, Outcome
from pipelines.training.unet import train_unet
from pipelines.use_cases.display import SILENT, Display
from pipelines.use_cases.out_of_fold import read_scores
from pipelines.use_cases.publishing import Publication, example_image, publish
from pipelines.use_cases.requests import TrainingRequest
from pipelines.use_cases.starting_weights import Start, starting_weights

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
# Characters of the settings that were changed in the name of a run.
MOST_SHOWN = 80
DONE_FILE = "registered"

# Kind of model that a task makes.
KIND = {"unet": "segmenter", "detector": "detector", "maskrcnn": "instance_segmenter"}


@dataclass(frozen=True)
class TrainingData:
    """The splits of a data set; validation and test may be absent."""

    train: Dataset
    val: Dataset | None
    test: Dataset | None

    def splits(self) -> list[tuple[Dataset, str]]:
        """Those that exist, with the context MLflow shows them in."""
        named = ((self.train, "training"), (self.val, "validation"), (self.test, "test"))
        return [(dataset, context) for dataset, context in named if dataset is not None]


@dataclass(frozen=True)
class Plan:
    """A training that is ready to start; ``key`` is a digest of recipe, data and code."""

    request: TrainingRequest
    recipe: Recipe
    device: str
    data: TrainingData
    key: str
    folder: Path
    inputs: Inputs
    start: Start
    keep_predictions: bool = False
    scores: Scores | None = None


@dataclass(frozen=True)
class Trained:
    """The version (None where it is not registered), its test metrics, and the run that made it."""

    name: str
    version: str | None
    run_id: str
    metrics: dict[str, float]
    task: str
    reused: bool = False


def train(registry: Registry, request: TrainingRequest, display: Display = SILENT) -> Trained:
    """Train (or resume, or reuse), evaluate, log and register.

    Raises:
        PlanesError: recipe, data, weights, engine or store that cannot be used.
    """
    return train_plan(registry, plan_training(request, registry=registry), display)


def train_plan(registry: Registry, plan: Plan, display: Display = SILENT) -> Trained:
    """Train what was planned, or take the version of an equal training where the request says so.

    Raises:
        PlanesError: data, weights or store that cannot be used; an equal training is going on.
    """
    request = plan.request
    known = registry.find_trained(request.register_as, plan.key) if request.reuse else None
    if known is not None:
        log.info(f"{request.register_as}: version {known.version} has this recipe, data and code; reused")
        metrics = json.loads(known.tags.get("metrics", "{}"))
        return Trained(request.register_as, str(known.version), str(known.run_id), metrics, request.task, reused=True)
    return run_plan(registry, plan, display)


def plan_training(
    request: TrainingRequest,
    data_of: Callable[[Recipe], TrainingData] | None = None,
    *,
    registry: Registry | None = None,
) -> Plan:
    """Read recipe and data; nothing is written yet.

    Args:
        data_of: what a recipe is trained and measured on, where it is not the splits of the request's data. The
            training then keeps its predictions for the test set.
        registry: where a version to start from is; that of the environment where it is None.

    Raises:
        PlanesError: recipe, data, weights, engine or name that cannot be used.
    """
    check_name(request.register_as)
    recipe = load_recipe(request.recipe, request.overrides, task=request.task, engine=request.engine)
    device = pick_device(request.device)
    start = starting_weights(recipe, registry)
    recipe = recipe.model_copy(update={"weights": start.name})
    # Another file may have come under the same name.
    more = [f"weights={start.digest}"] if start.digest else []
    if isinstance(recipe, Detectron2Recipe):
        require_detectron2()
        from pipelines.training.detectron2.trainer import training_config

        cfg = training_config(recipe, Path(), device)
        check_processes(request.num_gpus, device, cfg.SOLVER.IMS_PER_BATCH)
        more.append(cfg.dump())
    else:
        check_processes(request.num_gpus, device, recipe.training.batch_size)
        # What auto means here: weights of another precision would be others.
        more.append(f"precision={pick_precision(device, recipe.training.precision)}")
    # A version keeps what its scores mean: with other meanings it is another version.
    more += [f"scores={request.scores_from}"] if request.scores_from else []
    data = data_of(recipe) if data_of else _data(request, recipe)
    recipe = with_anchors(recipe, data.train)
    key = recipe.key(data.train.digest(), data.val.digest() if data.val else "", source_digest(), *more)
    inputs = Inputs.of(recipe.key(source_digest(), *more), data.train, data.val)
    folder = Path(request.work_dir) / f"{request.register_as}-{key}"
    plan = Plan(request, recipe, device, data, key, folder, inputs, start, keep_predictions=data_of is not None)
    start.warn_of(data.test)
    return plan if plan.folder.exists() or request.fresh else _continued(plan)


def _continued(plan: Plan) -> Plan:
    """The plan as that of a training that was begun with unreadable images too, where these have been removed since."""
    request, data = plan.request, plan.data
    earlier = find_earlier(plan.folder.parent, request.register_as, plan.inputs)
    if earlier is None:
        return plan
    every = {s.image_id: s for s in (*data.train.samples, *(data.val.samples if data.val else ()))}
    # In the order that they had: batches go by it.
    as_before = [tuple(every[i] for i in ids if i in every) for ids in (earlier.train, earlier.val)]
    train, val = replace(data.train, samples=as_before[0]), replace(data.train, split="val", samples=as_before[1])
    log.info(f"goes on in {earlier.folder}, begun with {earlier.removed} more images, which cannot be read")
    key = earlier.folder.name.removeprefix(f"{request.register_as}-")
    return replace(plan, data=replace(data, train=train, val=val if len(val) else None), key=key, folder=earlier.folder)


def _data(request: TrainingRequest, recipe: Recipe) -> TrainingData:
    where, settings = request.data, recipe.data
    full = open_dataset(where, "train", category=settings.category, scene_pattern=settings.scene_pattern).rendered(
        settings.rendering
    )
    log.info(full.summary())
    if not full.has_truth or not full.planes:
        raise DataError(f"{where}: no annotated planes to train on (expected train_coco.json or train.json)")
    test = open_test(where, settings.category, settings.scene_pattern)
    return split_data(full, test and test.rendered(settings.rendering), recipe)


def split_data(full: Dataset, test: Dataset | None, recipe: Recipe) -> TrainingData:
    """Part ``full`` into training and validation as the recipe says; parts that it cannot be measured on are None.

    Raises:
        DataError: one scene cannot be parted.
    """
    train, val = split_by_scene(full, recipe.data.val_fraction, recipe.seed)
    measurable = [
        _measurable(split, recipe, what) for split, what in ((val if len(val) else None, "validation"), (test, "test"))
    ]
    return TrainingData(train, *measurable)


def _measurable(dataset: Dataset | None, recipe: Recipe, what: str) -> Dataset | None:
    """A data set that this training can be measured on; else None, with the reason logged before the training."""
    if dataset is not None and isinstance(recipe, UNetRecipe) and not dataset.has_masks:
        log.info(f"no {what} metrics: {dataset.name}/{dataset.split} has no planes with outlines")
        return None
    return dataset


def open_test(where: str, category: str, scene_pattern: str | None) -> Dataset | None:
    """The test split of a data folder; None, with the reason logged, where there is none with ground truth."""
    if not Path(where).is_dir():
        return None
    try:
        test = open_dataset(where, "test", category=category, scene_pattern=scene_pattern, keep=True)
    except DataError as error:
        log.info(f"no test set: {error}")
        return None
    if not test.has_truth:
        log.info("no test metrics: the test images have no ground truth")
        return None
    return test


def source_digest() -> str:
    """Digest of the code that decides what a version is: models/ and pipelines/."""
    root = Path(models.__file__).parents[1]
    return code_digest(root / "models") + code_digest(root / "pipelines")


def run_plan(registry: Registry, plan: Plan, display: Display = SILENT, listeners: Sequence[Listener] = ()) -> Trained:
    """Train in the plan's folder, going on from what an interrupted equal training left there.

    Args:
        listeners: are notified besides MLflow and the display; one may end the training (`Stopped`).

    Raises:
        PlanesError: data, weights or store that cannot be used; an equal training is going on.
    """
    if plan.request.scores_from:
        # Before hours of training.
        plan = replace(plan, scores=read_scores(registry, plan.request.scores_from))
    with held(lock_of(plan.folder), f"an equal training of {plan.request.register_as}"):
        return _run_held(registry, plan, display, listeners)


def _run_held(registry: Registry, plan: Plan, display: Display, listeners: Sequence[Listener]) -> Trained:
    request, folder = plan.request, plan.folder
    if request.fresh or (folder / DONE_FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        if (folder / "checkpoint.pt").exists():
            raise OutputError(f"{folder}: cannot be removed (a link?); delete it, or give another --work-dir")
    folder.mkdir(parents=True, exist_ok=True)
    clear_temporaries(folder)
    noted = folder / RUN_FILE
    earlier = json.loads(noted.read_text())["run_id"] if noted.exists() else None
    tags = {"task": request.task, "recipe": plan.recipe.name, "training_key": plan.key}
    tags |= {"registered_as": request.register_as, "engine": plan.recipe.engine, "num_gpus": str(request.num_gpus)}
    tags |= {**({"variant": request.label} if request.label else {}), **request.tags, **_start_tags(plan)}
    title = f"{request.register_as} {request.label or plan.recipe.name}"
    # What tells two runs of one recipe apart.
    changes = "" if request.label else " ".join(request.overrides)[:MOST_SHOWN]
    name = f"{title} {changes}".rstrip()
    with mlflow_runs.tracked_run(registry.client, name, tags, resume_id=earlier, system_metrics=True) as run:
        run_id = run.info.run_id
        if earlier and earlier != run_id:
            mlflow.set_tag("resumed_from", earlier)
        write_whole(noted, lambda handle: handle.write(json.dumps({"run_id": run_id}).encode()))
        write_inputs(folder, plan.inputs)
        _log_inputs(plan)
        progress = display.training(request.register_as)
        started = time.monotonic()
        try:
            saved, outcome = _train(plan, display, (mlflow_runs.MlflowListener(run_id, registry.uri), progress, *listeners))
        except KeyboardInterrupt:
            log.warning("%s", progress.stopped())
            raise
        finally:
            progress.close()
        with mlflow_runs.store_errors(f"{title}: trained, but the run cannot be logged", OSError):
            mlflow.log_metrics({"wall_seconds": time.monotonic() - started, "best_step": outcome.step})
            _tell_unreadable(folder)
            mlflow.log_figure(figures.loss_figure(outcome.history, title), "figures/loss.png")
        trained = _publish(registry, plan, saved, run_id)
    (folder / DONE_FILE).write_text(str(trained.version))
    for left in (*folder.glob("checkpoint.pt"), *folder.glob("model_*.pth"), folder / "last_checkpoint"):
        left.unlink(missing_ok=True)
    return trained


def _start_tags(plan: Plan) -> dict[str, str]:
    return {"starts_from": plan.start.version} if plan.start.version else {}


def _tell_unreadable(folder: Path) -> None:
    """Say and log how many images turned out unreadable while training."""
    messages = Unreadable(folder).messages()
    mlflow.log_metric("images_unreadable", len(messages))
    if messages:
        log.info(f"{len(messages)} images could not be read or predicted (first: {next(iter(messages.values()))})")
        mlflow.log_text("\n".join(messages.values()) + "\n", "unreadable_images.txt")


def _log_inputs(plan: Plan) -> None:
    data = {"data": plan.request.data, "data_digest": plan.data.train.digest()}
    mlflow_runs.log_params({**plan.recipe.flat(), "device": plan.device, "precision": _precision(plan), **data})
    mlflow.log_dict(plan.recipe.model_dump(), "recipe.yaml")
    mlflow_runs.log_environment()
    for dataset, context in plan.data.splits():
        mlflow_runs.log_dataset(dataset, context)
    mlflow_runs.link_model(plan.start.model_id)
    if isinstance(plan.recipe, Detectron2Recipe):
        from pipelines.training.detectron2.trainer import training_config

        mlflow.log_text(training_config(plan.recipe, Path(), plan.device).dump(), "detectron2_config.yaml")


def _precision(plan: Plan) -> str:
    """The precision that the training runs in."""
    if not isinstance(plan.recipe, Detectron2Recipe):
        return pick_precision(plan.device, plan.recipe.training.precision)
    from pipelines.training.detectron2.precision import amp_precision
    from pipelines.training.detectron2.trainer import training_config

    mixed = training_config(plan.recipe, Path(), plan.device).SOLVER.AMP.ENABLED
    return amp_precision(plan.device) if mixed else "32"


def _train(plan: Plan, display: Display, listeners: Sequence[Listener]) -> tuple[Path, Outcome]:
    recipe, data = plan.recipe.model_copy(update={"weights": plan.start.local}), plan.data
    train = _training_tiles(plan, display)
    common: dict[str, Any] = {"folder": plan.folder, "device": plan.device, "listeners": listeners}
    common["num_gpus"] = plan.request.num_gpus
    if isinstance(recipe, Detectron2Recipe):
        from pipelines.training.detectron2.trainer import LOG, train_detectron2

        try:
            return train_detectron2(recipe, train, data.val, **common)
        finally:
            if (plan.folder / LOG).exists():
                mlflow.log_artifact(str(plan.folder / LOG))
    if isinstance(recipe, UNetRecipe):
        return train_unet(recipe, data.train, data.val, **common)
    return train_detector(recipe, train, data.val, **common)


def _training_tiles(plan: Plan, display: Display) -> Dataset:
    """The training images, cut where the recipe says so; cached tiles are shared by equal cuts of equal data."""
    train = plan.data.train
    if isinstance(plan.recipe, UNetRecipe) or plan.recipe.tiles is None:
        return train
    settings, seed = plan.recipe.tiles, plan.recipe.seed
    tiles = cut_tiles(train, settings, plan.recipe.min_visible, seed)
    empty = sum(not (~s.crowd).any() for s in tiles.samples)
    log.info(f"{tiles.summary()} in tiles of {settings.size} pixels, {empty} of them empty")
    mlflow.log_metrics({"training_tiles": len(tiles), "training_tiles_empty": empty})
    if not settings.cached:
        return tiles
    content = f"{train.digest()}{train.rendering.model_dump_json()}"
    folder = cache_folder(Path(plan.request.work_dir), settings, plan.recipe.min_visible, seed, content)
    return cached_tiles(tiles, folder, display.items, Unreadable(plan.folder))


def _publish(registry: Registry, plan: Plan, saved: Path, run_id: str) -> Trained:
    request, data = plan.request, plan.data
    what = Publication(
        saved,
        request.register_as,
        example_image(KIND[request.task], data.train),
        data.train,
        data.val,
        data.test,
        {"training_key": plan.key, "recipe": plan.recipe.name, **request.tags, **_start_tags(plan)},
        request.register,
        _training_images(plan),
        plan.scores,
        plan.keep_predictions,
    )
    number, metrics = publish(registry, what, run_id, device=plan.device)
    return Trained(request.register_as, number, run_id, metrics, request.task)


def _training_images(plan: Plan) -> TrainingImages:
    """What the version is trained on, and what the weights that it starts from were."""
    return united({"": images_of(plan.data.train, plan.data.val), plan.start.name: plan.start.images})
