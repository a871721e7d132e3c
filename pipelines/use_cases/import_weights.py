"""Weights trained elsewhere become a registered version."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlflow

from models.saved.checkpoints import load_strict, read_checkpoint
from models.saved.folder import save_model
from pipelines.recipes.settings import Detectron2Recipe, Recipe, UNetRecipe
from pipelines.registry.model_versions import Registry
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.publishing import Publication, example_image, publish
from pipelines.use_cases.requests import WORK_DIR, TrainingRequest
from pipelines.use_cases.training import KIND, Plan, Trained, plan_training


def import_weights(registry: Registry, weights: str, request: TrainingRequest) -> Trained:
    """Build the recipe's network, load the file into it whole, evaluate, log and register.

    Raises:
        PlanesError: recipe, data or engine that cannot be used, weights of another network.
    """
    return import_planned(registry, weights, plan_training(request))


def import_planned(registry: Registry, weights: str, plan: Plan) -> Trained:
    """`import_weights` of what was planned.

    Raises:
        PlanesError: as there.
    """
    request = plan.request
    Path(WORK_DIR).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_DIR) as folder:
        saved = load_into_network(plan.recipe, weights, Path(folder) / "model")
        tags = {"task": "import", "recipe": plan.recipe.name, "engine": plan.recipe.engine}
        with mlflow_runs.tracked_run(registry.client, f"import {Path(weights).name}", tags) as run:
            mlflow_runs.log_params({**plan.recipe.flat(), "weights": weights, "device": plan.device, "data": request.data})
            # What the weights were trained on is not known: nothing but test images says anything about them.
            if plan.data.test is not None:
                mlflow_runs.log_dataset(plan.data.test, "test")
            example = example_image(KIND[request.task], plan.data.train)
            tags = {"recipe": plan.recipe.name}
            what = Publication(saved, request.register_as, example, test=plan.data.test, tags=tags)
            version, metrics = publish(registry, what, run.info.run_id, device=plan.device)
            mlflow.set_tag("imported_from", Path(weights).name)
    return Trained(request.register_as, version, run.info.run_id, metrics, request.task)


def load_into_network(recipe: Recipe, weights: str, folder: Path) -> Path:
    """The recipe's network with the file's weights as a saved folder.

    Raises:
        ModelError: the file is of another network, or cannot be read safely.
    """
    classes = [recipe.data.category]
    if isinstance(recipe, Detectron2Recipe):
        from models.engines.detectron2.predictor import build_network, detectron2_spec
        from models.engines.detectron2.weights import load_whole
        from pipelines.training.detectron2.trainer import training_config

        cfg = training_config(recipe, Path(), "cpu")
        network = build_network(cfg, "cpu")
        load_whole(network, weights)
        made = detectron2_spec(recipe.config, cfg, classes, tiling=recipe.prediction, rendering=recipe.data.rendering)
        return save_model(folder, made, network.state_dict())
    if isinstance(recipe, UNetRecipe):
        from models.engines.unet.predictor import build_segmenter, segmenter_spec

        network = build_segmenter(recipe.architecture)
        spec = segmenter_spec(recipe.architecture, classes, recipe.data.rendering)
    else:
        from models.engines.torchvision.network import build_detector
        from models.engines.torchvision.predictor import detector_spec

        network = build_detector(recipe.architecture, 1)
        spec = detector_spec(recipe.architecture, classes, tiling=recipe.prediction, rendering=recipe.data.rendering)
    load_strict(network, read_checkpoint(weights), weights)
    return save_model(folder, spec, network.state_dict())
