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
from pipelines.evaluation.sample_pictures import SamplePictures
from pipelines.recipes.settings import UNetRecipe
from pipelines.training.detector import failures_of
from pipelines.training.group import ALONE, Group, weighted
from pipelines.training.loop import Job, Listener, Outcome, run
from pipelines.training.pictures import VALIDATION_SAMPLE
from pipelines.training.processes import train_in_processes


def train_unet(
    recipe: UNetRecipe,
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
    recipe: UNetRecipe,
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
    model = channels_last(build_segmenter(recipe.architecture, recipe.weights if group.rank == 0 else "none"))
    batches = SegmenterBatches(
        train,
        recipe.augmentation,
        recipe.architecture,
        batch_size=recipe.training.batch_size,
        box_jitter=recipe.box_jitter,
        seed=recipe.seed,
        unreadable=Unreadable(folder),
    )

    pictures = SamplePictures(val, crops=True, name=VALIDATION_SAMPLE) if val else None

    def validate(network: nn.Module) -> dict[str, float]:
        if not val:
            return {}
        predictions = predict_dataset(TorchSegmenter(network, recipe.architecture, device), val, pictures)
        masks = {f.image_id: f.masks or () for f in predictions.instances}
        metrics = evaluate_masks(val, [masks.get(s.image_id, ()) for s in val.samples]).finite()
        return metrics | failures_of(predictions, val, batches.unreadable)

    job = Job(
        model,
        batches,
        loss=segmenter_loss(recipe.loss, recipe.architecture.normalisation, group),
        training=recipe.training,
        optimizer=recipe.optimizer,
        folder=folder,
        device=device,
        evaluate=validate if val and val.planes else None,
        metric="IoU",
        pictures=pictures.take if pictures else None,
        listeners=listeners,
        group=group,
    )
    outcome = run(job)
    if group.rank > 0:
        return outcome
    spec = segmenter_spec(recipe.architecture, [recipe.data.category], recipe.data.rendering)
    save_model(folder / "model", spec, outcome.weights)
    return outcome


def segmenter_loss(
    name: str, normalisation: Literal["imagenet", "crop"] = "imagenet", group: Group = ALONE
) -> Callable[[nn.Module, tuple[np.ndarray, np.ndarray], torch.device], Mapping[str, torch.Tensor]]:
    """The loss function of a batch (crops, coverage masks): ``bce`` or ``bce_dice``.

    In a ``group`` of several processes the batch is this one's share, and its losses are parts of the whole batch's.
    """
    bce = nn.BCEWithLogitsLoss()
    dice = smp.losses.DiceLoss("binary")

    def loss(model: nn.Module, batch: tuple[np.ndarray, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
        crops, masks = batch
        # Sums over all pixels of a batch are no work for half precision.
        logits = model(torch.from_numpy(normalise(crops, normalisation)).to(device)).float()
        target = torch.from_numpy(masks)[:, None].to(device)
        losses = {"loss_bce": bce(logits, target)}
        if group.world > 1:
            number = group.total(torch.tensor(len(crops)))
            losses = weighted(losses, [len(crops) / int(number)])
        if name == "bce_dice":
            planes = (target >= 0.5).float()
            losses["loss_dice"] = dice(logits, planes) if group.world == 1 else shared_dice(logits, planes, group)
        return losses

    return loss


def shared_dice(logits: torch.Tensor, planes: torch.Tensor, group: Group) -> torch.Tensor:
    """This process's part of smp's Dice loss over the pixels of all processes: its gradients, an equal part of the value.

    Args:
        logits: of this process's crops, (B, 1, S, S).
        planes: as ``logits``, 1 where there is a plane, else 0.
    """
    found = nn.functional.logsigmoid(logits).exp()
    own = torch.stack([(found * planes).sum(), (found + planes).sum(), planes.sum()])
    known = own.detach()
    all_of_them = own + (group.total(known.double().cpu()).to(known) - known)
    both, either, true = all_of_them
    loss = (1 - 2 * both / either.clamp_min(2e-7)) * (true > 0)
    return loss - loss.detach() * (1 - 1 / group.world)
