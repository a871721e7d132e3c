"""Training of torchvision's Faster and Mask R-CNN: losses, validation AP, saved folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.engines.torchvision.network import build_detector
from models.engines.torchvision.predictor import TorchvisionDetector, detector_spec
from models.predictor import Predictor
from models.runtime.devices import channels_last
from models.saved.folder import save_model
from models.tiling.predictor import by_tiles
from pipelines.data.dataset import Dataset
from pipelines.data.loading.batches import DetectorBatches, Example
from pipelines.data.loading.unreadable import Unreadable
from pipelines.evaluation.inference import Predictions, predict_dataset
from pipelines.evaluation.metrics import evaluate_instances
from pipelines.evaluation.sample_pictures import SamplePictures
from pipelines.recipes.settings import DetectorRecipe, MaskRecipe
from pipelines.training.group import Group
from pipelines.training.loop import Job, Listener, Outcome, run
from pipelines.training.pictures import VALIDATION_SAMPLE
from pipelines.training.processes import train_in_processes
from pipelines.training.shared_detector import SharedLoss
from pipelines.training.synthetic import draw_scenes, drawn_windows


def train_detector(
    recipe: DetectorRecipe | MaskRecipe,
    train: Dataset,
    val: Dataset | None,
    *,
    folder: Path,
    device: str,
    listeners: Sequence[Listener] = (),
    num_gpus: int = 1,
) -> tuple[Path, Outcome]:
    """Train (or resume) in ``folder`` and save the chosen weights as ``folder/model``.

    ``num_gpus`` processes share each batch (`train_in_processes`); their outcome comes without weights.

    Raises:
        PlanesError: data, settings or weights that cannot be used.
    """
    draw_scenes(recipe, folder)
    outcome = train_in_processes(
        _train,
        (recipe, train, val, folder),
        num_gpus,
        device=device,
        batch_size=recipe.training.batch_size,
        listeners=listeners,
    )
    return folder / "model", outcome


def _train(
    recipe: DetectorRecipe | MaskRecipe,
    train: Dataset,
    val: Dataset | None,
    folder: Path,
    *,
    device: str,
    listeners: Sequence[Listener],
    group: Group,
) -> Outcome:
    """Train in one process of a group; the first one saves."""
    torch.manual_seed(recipe.seed)
    # The others begin with the first one's weights.
    network = build_detector(recipe.architecture, 1, recipe.weights if group.rank == 0 else "none")
    model = channels_last(network)
    masks = recipe.task == "maskrcnn"
    # With a size given, the network scales the images itself.
    zoom = recipe.architecture.zoom if recipe.architecture.min_size is None else 1.0
    batches = DetectorBatches(
        train,
        recipe.augmentation,
        batch_size=recipe.training.batch_size,
        window=recipe.window,
        focus=recipe.focus,
        min_visible=recipe.min_visible,
        seed=recipe.seed,
        zoom=recipe.window_zoom * zoom,
        plane_sizes=recipe.plane_sizes,
        masks=masks,
        other=drawn_windows(recipe, folder, zoom),
        unreadable=Unreadable(folder),
    )

    pictures = SamplePictures(val, crops=False, name=VALIDATION_SAMPLE) if val else None

    def validate(network: nn.Module) -> dict[str, float]:
        predictor = by_tiles(TorchvisionDetector(network, device), recipe.prediction, device)
        if not val:
            return {}
        return validation_metrics(predictor, val, masks=masks, unreadable=batches.unreadable, pictures=pictures)

    job = Job(
        model,
        batches,
        loss=detector_loss if group.world == 1 else SharedLoss(network, detector_loss, group, recipe.training.batch_size),
        training=recipe.training,
        optimizer=recipe.optimizer,
        folder=folder,
        device=device,
        evaluate=validate if val and val.planes else None,
        metric="mask_AP" if masks and val and val.has_masks else "AP",
        pictures=pictures.take if pictures else None,
        listeners=listeners,
        group=group,
    )
    outcome = run(job)
    if group.rank > 0:
        return outcome
    spec = detector_spec(
        recipe.architecture, [recipe.data.category], tiling=recipe.prediction, rendering=recipe.data.rendering
    )
    save_model(folder / "model", spec, outcome.weights)
    return outcome


def validation_metrics(
    predictor: Predictor, val: Dataset, *, masks: bool, unreadable: Unreadable, pictures: SamplePictures | None = None
) -> dict[str, float]:
    """COCO's numbers of the boxes, those of the masks prefixed ``mask_``, and how many images failed, if any.

    Those count as images without detections, and are noted as ``unreadable``. ``pictures`` are drawn meanwhile.
    """
    predictions = predict_dataset(predictor, val, pictures)
    metrics = evaluate_instances(val, predictions.instances).finite()
    if masks and val.has_masks:
        metrics |= evaluate_instances(val, predictions.instances, "segm").finite("mask_")
    return metrics | failures_of(predictions, val, unreadable)


def failures_of(predictions: Predictions, val: Dataset, unreadable: Unreadable) -> dict[str, float]:
    """The metric ``images_failed`` of a validation, if there are any, each noted and reported once."""
    for sample in val.samples:
        if sample.image_id in predictions.failed:
            unreadable.add(sample, predictions.failed[sample.image_id], "counts as an image without detections")
    return {"images_failed": float(len(predictions.failed))} if predictions.failed else {}


def detector_loss(model: nn.Module, batch: Sequence[Example], device: torch.device) -> Mapping[str, torch.Tensor]:
    """torchvision's losses of a batch: four, and a fifth where the examples have masks."""
    images = [torch.from_numpy(e.image.transpose(2, 0, 1).copy()).to(device).float() / 255 for e in batch]
    targets: list[dict[str, Any]] = []
    for example in batch:
        boxes = torch.from_numpy(np.ascontiguousarray(example.boxes, dtype=np.float32)).reshape(-1, 4).to(device)
        labels = torch.ones(len(boxes), dtype=torch.int64, device=device)
        targets.append({"boxes": boxes, "labels": labels})
        if example.masks is not None:
            targets[-1]["masks"] = torch.from_numpy(example.masks).to(device)
    return model(images, targets)
