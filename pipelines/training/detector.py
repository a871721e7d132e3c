"""Training of a box detector: losses, validation AP, saved folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.instances import Instances
from models.predictor import Predictor, save_model
from models.torch_tools import channels_last
from models.torchvision_engine import TorchvisionDetector, build_detector, detector_spec
from pipelines.data.batches import DetectorBatches
from pipelines.data.dataset import Dataset
from pipelines.evaluation import evaluate_instances
from pipelines.recipe import DetectorRecipe
from pipelines.training.loop import Job, Listener, Outcome, run


def train_detector(
    recipe: DetectorRecipe,
    train: Dataset,
    val: Dataset | None,
    folder: Path,
    device: str,
    listeners: Sequence[Listener] = (),
) -> tuple[Path, Outcome]:
    """Train (or resume) in ``folder`` and save the chosen weights as ``folder/model``.

    Raises:
        PlanesError: data, settings or weights that cannot be used.
    """
    torch.manual_seed(recipe.training.seed)
    model = channels_last(build_detector(recipe.architecture, 1, recipe.weights))
    batches = DetectorBatches(
        train,
        recipe.augmentation,
        recipe.training.batch_size,
        recipe.window,
        recipe.focus,
        recipe.min_visible,
        recipe.training.seed,
        recipe.architecture.zoom,
    )

    def validate(network: nn.Module) -> dict[str, float]:
        found = list(predict_dataset(TorchvisionDetector(network, device), val)) if val else []
        return evaluate_instances(val, found).finite() if val else {}

    job = Job(
        model,
        batches,
        detector_loss,
        recipe.training,
        recipe.optimizer,
        folder,
        device,
        validate if val and val.planes else None,
        "AP",
        listeners,
    )
    outcome = run(job)
    saved = save_model(folder / "model", detector_spec(recipe.architecture, [recipe.data.category]), outcome.weights)
    return saved, outcome


def detector_loss(
    model: nn.Module, batch: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device
) -> Mapping[str, torch.Tensor]:
    """torchvision's four losses of a batch of (RGB uint8 image, xyxy boxes)."""
    images = [torch.from_numpy(image.transpose(2, 0, 1).copy()).to(device).float() / 255 for image, _ in batch]
    targets: list[dict[str, Any]] = [
        {
            "boxes": torch.from_numpy(np.ascontiguousarray(boxes, dtype=np.float32)).reshape(-1, 4).to(device),
            "labels": torch.ones(len(boxes), dtype=torch.int64, device=device),
        }
        for _, boxes in batch
    ]
    return model(images, targets)


def predict_dataset(predictor: Predictor, dataset: Dataset) -> Iterator[Instances]:
    """Predict the images of a data set one by one, named by their image ids."""
    for sample in dataset.samples:
        yield predictor.predict([sample.read()])[0].named(sample.image_id)
