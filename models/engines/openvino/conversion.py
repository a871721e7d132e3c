"""A saved model converted to OpenVINO: its twin, a saved folder of its own."""

from __future__ import annotations

import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList

from models.engines.detectron2.predictor import Detectron2Predictor
from models.engines.openvino.dense import is_dense
from models.engines.openvino.network import require_openvino, shared_core
from models.engines.openvino.settings import ImageInput, TwinArchitecture
from models.engines.torchvision.predictor import TorchvisionDetector
from models.engines.unet.predictor import Probabilities, TorchSegmenter
from models.engines.unet.settings import CropSettings
from models.errors import ModelError, one_line
from models.predictor import Predictor
from models.saved.allowed_files import NETWORK_FILE, NETWORK_WEIGHTS_FILE
from models.saved.folder import write_folder
from models.saved.spec import ModelSpec, parse_architecture, read_spec

# What OpenVINO calls the mark of a layer that keeps its precision.
MARK = "DisablePrecisionConversion"

# Sides of the image that a detector is traced with; the network that comes of it takes any.
TRACED = (224, 256)


def save_twin(folder: str | Path, predictor: Predictor, spec: ModelSpec, digest: str) -> Path:
    """Convert a loaded model and write its twin in full precision, whole or not at all.

    Args:
        folder: where to; replaced if it is there.
        predictor: the model on the CPU, of whole images.
        spec: of the model.
        digest: of the model's saved folder, 64 hex digits.

    Raises:
        EngineMissing: OpenVINO is not installed.
        ModelError: an engine that has no twin, or a network that OpenVINO cannot convert.
    """
    openvino = require_openvino()
    module, example, settings = parts_of(predictor, spec)
    with warnings.catch_warnings(), torch.inference_mode():
        # Tracing warns of every shape that it takes for constant.
        warnings.simplefilter("ignore")
        try:
            network = openvino.convert_model(module, example_input=example)
        except Exception as error:
            raise ModelError(f"{spec.kind}/{spec.engine}: OpenVINO cannot convert it ({one_line(error, 200)})") from error
    first = network.inputs[0].get_partial_shape()
    # One image at a time; crops in batches of any size.
    shape = [1, 3, -1, -1] if settings.image else [-1, *first[1:]]
    network.reshape({0: shape, **({1: [2]} if settings.image else {})})
    architecture = TwinArchitecture(
        precision="f32", parent_engine=spec.engine, parent_digest=digest, image=settings.image, crop=settings.crop
    )
    made = spec.model_copy(
        update={
            "engine": "openvino",
            "architecture": architecture.model_dump(),
            "versions": {**spec.versions, "openvino": version("openvino")},
        }
    )

    def fill(into: Path) -> None:
        # Otherwise weights would be saved as float16.
        try:
            openvino.save_model(network, str(into / NETWORK_FILE), compress_to_fp16=False)
        except RuntimeError as error:
            # Of a full disk it tells no more than that the stream failed.
            raise ModelError(f"{into}: cannot be written ({one_line(error, 160)}); is the disk full?") from error

    return write_folder(folder, made, fill)


def halve_twin(exact: str | Path, into: str | Path) -> Path:
    """Write the twin in bfloat16 of one in full precision, whole or not at all; its weights stay in float32.

    Raises:
        EngineMissing: OpenVINO is not installed.
        ModelError: no saved twin, or a release of OpenVINO that would round the geometry of boxes.
    """
    spec = read_spec(exact)
    architecture = parse_architecture(spec, TwinArchitecture).model_copy(update={"precision": "bf16"})

    def fill(folder: Path) -> None:
        for name in (NETWORK_FILE, NETWORK_WEIGHTS_FILE):
            shutil.copyfile(Path(exact) / name, folder / name)
        if architecture.image:
            _keep_geometry_exact(folder / NETWORK_FILE)

    return write_folder(into, spec.model_copy(update={"architecture": architecture.model_dump()}), fill)


def _keep_geometry_exact(path: Path) -> None:
    """Mark all of a detector but its dense layers, and what is pooled for them, to be computed in full precision.

    In bfloat16 a border lies on a grid of pixels, and what is pooled from a box is of another place. Measured on the
    airfield's 12 test scenes: AP 0.6399 in float32, 0.6292 in bfloat16, 0.6397 so, in the same time.
    """
    tree = ElementTree.parse(path)
    marked = []
    for layer in tree.iterfind("layers/layer"):
        name = layer.get("name", "")
        kind = layer.get("type", "")
        # ROIAlign takes its boxes in float32 whatever it pools; float32 takes longer for features in bfloat16.
        if kind in ("Const", "Parameter", "Result", "ROIAlign") or is_dense(name, kind):
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, info)
        ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0", "value": "dynamic:f16,bf16"})
        marked.append(name)
    tree.write(path)
    # A release that reads such marks no more would round without a word.
    known = {op.get_friendly_name(): op.get_rt_info() for op in shared_core().read_model(str(path)).get_ops()}
    if not marked or not all(any(MARK in key for key in known[name]) for name in marked):
        raise ModelError(f"OpenVINO {version('openvino')} keeps no layer in full precision; make the twin in f32")


class InputSettings(NamedTuple):
    """What the twin's architecture says of its input."""

    image: ImageInput | None = None
    crop: CropSettings | None = None


def parts_of(predictor: Predictor, spec: ModelSpec) -> tuple[nn.Module, Any, InputSettings]:
    """The network to trace, an example of its input, and its settings."""
    # Numbers of its own: those of whoever calls stay as they are.
    own = torch.Generator().manual_seed(0)
    if isinstance(predictor, TorchSegmenter):
        size = predictor.settings.crop_size
        crop = CropSettings(**{name: getattr(predictor.settings, name) for name in CropSettings.model_fields})
        return (
            Probabilities(predictor.model, flips=False),
            torch.rand(2, 3, size, size, generator=own),
            InputSettings(crop=crop),
        )
    example = torch.rand(1, 3, *TRACED, generator=own), torch.tensor([side - 10 for side in TRACED])
    if isinstance(predictor, TorchvisionDetector):
        return _TorchvisionNetwork(predictor.model), example, InputSettings(image=_torchvision_input(predictor.model))
    if isinstance(predictor, Detectron2Predictor):
        return _Detectron2Network(predictor.model), example, InputSettings(image=_detectron2_input(predictor))
    raise ModelError(f"{spec.kind}/{spec.engine}: has no twin")


class _Wrapped(nn.Module):
    """A network between what its twin does without torch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network


class _TorchvisionNetwork(_Wrapped):
    """A torchvision detector between its transforms: one image, resized, normalised and padded.

    Takes it (1, 3, H, W) and the height and width of the image in it; gives boxes in these pixels (N, 4), scores (N),
    labels from 0 (N), and masks of the boxes (N, 1, M, M) where it has them.
    """

    def forward(self, pixels: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        network = self.network
        images = ImageList(pixels, [(size[0], size[1])])
        features = network.backbone(pixels)
        proposals, _ = network.rpn(images, features, None)
        detections, _ = network.roi_heads(features, proposals, images.image_sizes, None)
        instances = detections[0]
        masks = (instances["masks"],) if "masks" in instances else ()
        return instances["boxes"], instances["scores"], instances["labels"] - 1, *masks


def _torchvision_input(network: Any) -> ImageInput:
    transform = network.transform
    return ImageInput(
        zoom=transform.zoom,
        min_size=transform.min_size[-1],
        max_size=transform.max_size,
        resampling="linear" if transform.zoom is None else "antialias",
        mean=list(transform.image_mean),
        std=list(transform.image_std),
        divisor=transform.size_divisible,
    )


class _Detectron2Network(_Wrapped):
    """A Detectron2 network between its transforms; takes and gives what `_TorchvisionNetwork` does."""

    def forward(self, pixels: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from detectron2.export.torchscript_patch import patch_builtin_len
        from detectron2.structures import ImageList as Images

        network = self.network
        images = Images(pixels, [(size[0], size[1])])
        # Otherwise the number of proposals of this image would be that of all.
        with patch_builtin_len():
            features = network.backbone(pixels)
            if hasattr(network, "head_in_features"):
                maps = [features[name] for name in network.head_in_features]
                instances = network.forward_inference(images, maps, network.head(maps))[0]
            else:
                proposals, _ = network.proposal_generator(images, features, None)
                instances = network.roi_heads(images, features, proposals, None)[0][0]
        masks = (instances.pred_masks,) if instances.has("pred_masks") else ()
        return instances.pred_boxes.tensor, instances.scores, instances.pred_classes, *masks


def _detectron2_input(predictor: Detectron2Predictor) -> ImageInput:
    network: Any = predictor.model
    resize = predictor.resize
    return ImageInput(
        min_size=resize.short_edge_length[0],
        max_size=resize.max_size,
        resampling="pillow",
        bgr=predictor.format == "BGR",
        scale=1.0,
        mean=network.pixel_mean.flatten().tolist(),
        std=network.pixel_std.flatten().tolist(),
        divisor=network.backbone.size_divisibility,
        masks="detectron2",
    )
