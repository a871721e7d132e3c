"""Entry point ``import_model``: weights trained elsewhere become a registered version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipelines.steps.cli_support import friendly
from pipelines.steps.options import AS_RECIPE, WORK_DIR, TrainingRequest, split_words


@click.command()
@click.option("--weights", required=True, help="A .pth, .pkl or .safetensors file of exactly the recipe's network.")
@click.option("--recipe", default="course_det_default", show_default=True, help="Recipe that describes the network.")
@click.option("--data", default="data/airfield", show_default=True, help="Data to evaluate on; its test split is used.")
@click.option("--name", default="planes-det", show_default=True, help="Registered model to add a version to.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--engine", default=AS_RECIPE, type=click.Choice([AS_RECIPE, "torchvision", "detectron2"]), show_default=True)
@click.option("--set", "overrides", multiple=True, help="section.key=value of the recipe; repeatable.")
@click.argument("opts", nargs=-1, metavar="[KEY VALUE]...")
@friendly
def main(weights: str, recipe: str, engine: str, overrides: tuple[str, ...], opts: tuple[str, ...], **options: Any) -> None:
    """Register weights trained elsewhere, such as the model_final.pth of a Detectron2 training.

    Nothing in the file is executed; it leaves as safetensors. KEY VALUE pairs are
    Detectron2's settings, those that the weights were trained with.
    """
    from pipelines.recipes.reading import load_recipe, opts_overrides

    pairs = opts_overrides(split_words(opts))
    changes = (*split_words(overrides), *pairs)
    named = None if engine == AS_RECIPE else engine
    task = load_recipe(recipe, engine=named).task
    import_weights(
        weights, TrainingRequest(task, recipe, options["data"], options["name"], options["device"], changes, named)
    )


def import_weights(weights: str, request: TrainingRequest) -> None:
    """Build the recipe's network, load the file into it whole, evaluate, log and register.

    Raises:
        PlanesError: recipe, data or engine that cannot be used, weights of another network.
    """
    import tempfile

    import mlflow

    from pipelines.steps.publishing import Publication, example_image, publish
    from pipelines.steps.training import KIND, Trained, plan_training, report
    from pipelines.tracking import mlflow_runs

    plan = plan_training(request)
    mlflow_runs.connect()
    Path(WORK_DIR).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_DIR) as folder:
        saved = load_into_network(plan.recipe, weights, Path(folder) / "model")
        tags = {"task": "import", "recipe": plan.recipe.name, "engine": plan.recipe.engine}
        with mlflow_runs.tracked_run(f"import {Path(weights).name}", tags) as run:
            mlflow_runs.log_params({**plan.recipe.flat(), "weights": weights, "device": plan.device, "data": request.data})
            # What the weights were trained on is not known: nothing but test images says anything about them.
            if plan.data.test is not None:
                mlflow_runs.log_dataset(plan.data.test, "test")
            example = example_image(KIND[request.task], plan.data.train)
            tags = {"recipe": plan.recipe.name}
            what = Publication(saved, request.register_as, example, test=plan.data.test, tags=tags)
            version, metrics = publish(what, run.info.run_id, plan.device)
            mlflow.set_tag("imported_from", Path(weights).name)
    report(Trained(request.register_as, version, run.info.run_id, metrics, request.task))


def load_into_network(recipe: Any, weights: str, folder: Path) -> Path:
    """The recipe's network with the file's weights as a saved folder.

    Raises:
        ModelError: the file is of another network, or cannot be read safely.
    """
    from models.saved.checkpoints import load_strict, read_checkpoint
    from models.saved.folder import save_model
    from pipelines.recipes.settings import Detectron2Recipe, UNetRecipe

    classes = [recipe.data.category]
    if isinstance(recipe, Detectron2Recipe):
        from models.engines.detectron2.predictor import build_network, detectron2_spec
        from models.engines.detectron2.weights import load_whole
        from pipelines.training.detectron2.trainer import training_config

        cfg = training_config(recipe, Path(), "cpu")
        network = build_network(cfg, "cpu")
        load_whole(network, weights)
        made = detectron2_spec(recipe.config, cfg, classes, recipe.prediction, recipe.data.rendering)
        return save_model(folder, made, network.state_dict())
    if isinstance(recipe, UNetRecipe):
        from models.engines.unet.predictor import build_segmenter, segmenter_spec

        network = build_segmenter(recipe.architecture)
        spec = segmenter_spec(recipe.architecture, classes, recipe.data.rendering)
    else:
        from models.engines.torchvision.network import build_detector
        from models.engines.torchvision.predictor import detector_spec

        network = build_detector(recipe.architecture, 1)
        spec = detector_spec(recipe.architecture, classes, recipe.prediction, recipe.data.rendering)
    load_strict(network, read_checkpoint(weights), weights)
    return save_model(folder, spec, network.state_dict())


if __name__ == "__main__":
    main()
