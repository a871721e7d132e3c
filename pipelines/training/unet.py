"""Training of a crop segmenter: losses, validation IoU, saved folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import nn

from models.engines.unet.crops import normalise
from models.engines.unet.predictor import TorchSegmenter, build_segmenter, segmenter_spec
from models.runtime.devices import channels_last
from models.saved.folder import save_model
from pipelines.data.dataset import Dataset
from pipelines.data.loading.batches import SegmenterBatches
from pipelines.data.loading.unreadable import Unreadable
from pipelines.evaluation.inference import predict_dataset
from pipelines.evaluation.metrics import evaluate_masks
from pipelines.recipes.settings import UNetRecipe
from pipelines.training.detector import failures_of
from pipelines.training.loop import Job, Listener, Outcome, run


def train_unet(
    recipe: UNetRecipe,
    train: Dataset,
    val: Dataset | None,
    *,
    folder: Path,
    device: str,
    listeners: Sequence[Listener] = (),
) -> tuple[Path, Outcome]:
    """Train (or resume) in ``folder`` and save the chosen weights as ``folder/model``.

    Raises:
        PlanesError: data, settings or weights that cannot be used.
    """
    torch.manual_seed(recipe.seed)
    model = channels_last(build_segmenter(recipe.architecture, recipe.weights))
    batches = SegmenterBatches(
        train,
        recipe.augmentation,
        recipe.architecture,
        batch_size=recipe.training.batch_size,
        box_jitter=recipe.box_jitter,
        seed=recipe.seed,
        unreadable=Unreadable(folder),
    )

    def validate(network: nn.Module) -> dict[str, float]:
        if not val:
            return {}
        predictions = predict_dataset(TorchSegmenter(network, recipe.architecture, device), val)
        masks = {f.image_id: f.masks or () for f in predictions.instances}
        metrics = evaluate_masks(val, [masks.get(s.image_id, ()) for s in val.samples]).finite()
        return metrics | failures_of(predictions, val, batches.unreadable)

    job = Job(
        model,
        batches,
        loss=segmenter_loss(recipe.loss, recipe.architecture.normalisation),
        training=recipe.training,
        optimizer=recipe.optimizer,
        folder=folder,
        device=device,
        evaluate=validate if val and val.planes else None,
        metric="IoU",
        listeners=listeners,
    )
    outcome = run(job)
    spec = segmenter_spec(recipe.architecture, [recipe.data.category], recipe.data.rendering)
    saved = save_model(folder / "model", spec, outcome.weights)
    return saved, outcome


def segmenter_loss(
    name: str, normalisation: Literal["imagenet", "crop"] = "imagenet"
) -> Callable[[nn.Module, tuple[np.ndarray, np.ndarray], torch.device], Mapping[str, torch.Tensor]]:
    """The loss function of a batch (crops, coverage masks): ``bce`` or ``bce_dice``."""
    bce = nn.BCEWithLogitsLoss()
    dice = smp.losses.DiceLoss("binary")

    def loss(model: nn.Module, batch: tuple[np.ndarray, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
        crops, masks = batch
        # Sums over all pixels of a batch are no work for half precision.
        logits = model(torch.from_numpy(normalise(crops, normalisation)).to(device)).float()
        target = torch.from_numpy(masks)[:, None].to(device)
        losses = {"loss_bce": bce(logits, target)}
        if name == "bce_dice":
            losses["loss_dice"] = dice(logits, (target >= 0.5).float())
        return losses

    return loss
