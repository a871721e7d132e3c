"""Segmentation of a plane inside its box crop: the U-Net family of smp and the course's SkipNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from models.engines.unet.crops import CPU_BATCH, GPU_BATCH, CropSegmenter
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import ModelError, one_line
from models.images.rendering import DEFAULT, Rendering
from models.runtime.devices import channels_last, library_versions, pick_device, to_device
from models.runtime.replay import Replayed
from models.saved.checkpoints import build_fitting, download_error, load_matching, read_checkpoint
from models.saved.spec import ModelSpec, parse_architecture


def build_segmenter(architecture: SegmenterArchitecture, weights: str = "none") -> nn.Module:
    """Build the network: (B, 3, S, S) normalised to logits (B, 1, S, S).

    Args:
        weights: ``none``, a name that smp knows as ``encoder_weights`` of the encoder
            (``imagenet``, ...), or a local folder, .safetensors or .pth.

    Raises:
        ModelError: unknown network, encoder or weights.
    """
    if architecture.network == "skipnet":
        if architecture.crop_size % 64:
            raise ModelError(f"architecture.crop_size: skipnet needs a multiple of 64, not {architecture.crop_size}")
        from models.engines.unet.skipnet import SkipNet

        model: nn.Module = SkipNet()
        if weights != "none":
            load_matching(model, read_checkpoint(weights), weights)
        return model
    return _smp_network(architecture, weights)


def _smp_network(architecture: SegmenterArchitecture, weights: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    local = "/" in weights or weights.endswith((".pth", ".safetensors"))
    more = {"decoder_channels": tuple(architecture.decoder_channels)} if architecture.decoder_channels else {}
    try:
        model = smp.create_model(
            architecture.network.lower(),
            encoder_name=architecture.encoder,
            encoder_weights=None if local or weights == "none" else weights,
            in_channels=3,
            classes=1,
            **more,
        )
    except (OSError, RuntimeError) as error:
        raise download_error(f"{architecture.encoder} ({weights})", error) from error
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"architecture: {one_line(error, 400)}") from error
    if local:
        load_matching(model, read_checkpoint(weights), weights)
    return model


def segmenter_spec(
    architecture: SegmenterArchitecture, classes: Sequence[str], rendering: Rendering = DEFAULT
) -> ModelSpec:
    """The model.json of a crop segmenter."""
    return ModelSpec(
        kind="segmenter",
        engine=architecture.engine,
        architecture=architecture.model_dump(),
        classes=list(classes),
        versions=library_versions(),
        rendering=rendering,
    )


def load_segmenter(spec: ModelSpec, weights: Mapping[str, torch.Tensor], device: str) -> TorchSegmenter:
    """Build the predictor of a saved crop segmenter.

    Raises:
        ModelError: wrong architecture fields or weights that do not fit.
    """
    architecture = parse_architecture(spec, SegmenterArchitecture)
    model = build_fitting(lambda: build_segmenter(architecture), weights, f"segmenter {architecture.network}")
    segmenter = TorchSegmenter(model, architecture, device)
    if segmenter.device != "cpu":
        segmenter.replay()
    return segmenter


# On a GPU a batch is filled up to one of these sizes: each size costs a choice of kernels, and small ones are recorded.
SIZES = (1, 2, 4, 8, *range(16, GPU_BATCH + 1, 16))


class TorchSegmenter(CropSegmenter):
    """Segments the plane in a crop, with a network of torch."""

    def __init__(self, model: nn.Module, architecture: SegmenterArchitecture, device: str = "cpu") -> None:
        self.device = pick_device(device)
        super().__init__(architecture, CPU_BATCH if self.device == "cpu" else GPU_BATCH)
        self.model = channels_last(model.to(self.device)).eval()
        self._probabilities: nn.Module = Probabilities(self.model, architecture.flips)

    def replay(self) -> None:
        """Let a network that is trained no more be replayed on its GPU; see `Replayed`."""
        self._probabilities = Replayed(self._probabilities)

    @torch.inference_mode()
    def forward(self, batch: np.ndarray) -> np.ndarray:
        """See `CropSegmenter`."""
        number = len(batch)
        if self.device != "cpu":
            batch = filled_up(batch)
        tensor = to_device(torch.from_numpy(batch), self.device)
        return self._probabilities(tensor)[:number].float().cpu().numpy()


def filled_up(batch: np.ndarray) -> np.ndarray:
    """The batch (B, ...) with zeros up to the next of `SIZES`, in the same memory layout."""
    size = next((size for size in SIZES if size >= len(batch)), len(batch))
    filled = np.zeros_like(batch, shape=(size, *batch.shape[1:]))
    filled[: len(batch)] = batch
    return filled


class Probabilities(nn.Module):
    """Of being plane, (B, S, S), for crops (B, 3, S, S); with ``flips`` the mean over both mirrored axes."""

    def __init__(self, model: nn.Module, flips: bool) -> None:
        super().__init__()
        self.model, self.flips = model, flips

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """See the class."""
        total = torch.sigmoid(self.model(crops))
        if self.flips:
            for dims in ((2,), (3,), (2, 3)):
                total = total + torch.sigmoid(self.model(crops.flip(dims))).flip(dims)
            total = total / 4
        return total[:, 0]
