"""Detectron2's networks as a Predictor: configuration, safe loading of weights, prediction.

Detectron2 is imported on use; nothing else in the project needs it.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.engines.detectron2.architecture import Detectron2Architecture
from models.errors import EngineMissing, ModelError, one_line
from models.geometry.boxes import clip_boxes, crop_window, pixel_sized
from models.geometry.rle import rle_paste
from models.images.rendering import DEFAULT, Rendering
from models.instances import RLE, Instances
from models.runtime.devices import library_versions, pick_device
from models.runtime.timing import timed
from models.saved.checkpoints import build_fitting
from models.saved.spec import ModelSpec, parse_architecture
from models.tiling.settings import Tiling

# What decides a prediction; the rest of a config is about training, data and machines.
SAVED = ("MODEL.", "INPUT.", "TEST.DETECTIONS_PER_IMAGE")
NOT_SAVED = ("MODEL.DEVICE", "MODEL.WEIGHTS")
GET_IT = (
    "Detectron2 is not installed: get it with `conda install -c conda-forge detectron2`, or build it as "
    "https://detectron2.readthedocs.io/tutorials/install.html says"
)


def require_detectron2() -> None:
    """Check that Detectron2 can be imported.

    Raises:
        EngineMissing: it is not installed, or does not fit this torch.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise EngineMissing(GET_IT)
    # Detectron2's calls of torch bring warnings that its users can do nothing about.
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        import detectron2.modeling  # noqa: F401
    except ImportError as error:
        raise EngineMissing(
            f"Detectron2 cannot be imported ({one_line(error, 160)}); build it again with this torch"
        ) from error


def zoo_folder() -> Path:
    """Folder of the model zoo's configs inside the installed Detectron2."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        raise EngineMissing(GET_IT)
    return Path(spec.origin).parent / "model_zoo" / "configs"


def zoo_configs() -> list[str]:
    """Names of all YAML configs of the model zoo, such as ``COCO-Detection/faster_rcnn_R_50_FPN_3x``."""
    folder = zoo_folder()
    names = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob("*/*.yaml"))
    return [name for name in names if "Base-" not in name]


def make_config(config: str, opts: Mapping[str, Any], classes: int) -> Any:
    """Detectron2's configuration (a CfgNode) of a model zoo name or a YAML file, changed by ``opts``.

    Raises:
        EngineMissing: no Detectron2.
        ModelError: unknown config or key (naming the nearest), a value of another type.
    """
    require_detectron2()
    from detectron2.config import get_cfg

    cfg = get_cfg()
    path = _config_path(config)
    try:
        # Detectron2's default runs Python code in YAML; its own RetinaNet configs need that, a user's file may not.
        cfg.merge_from_file(str(path), allow_unsafe=path.is_relative_to(zoo_folder()))
    except Exception as error:
        raise ModelError(f"config {config}: cannot be used ({one_line(error, 200)})") from error
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
    apply_settings(cfg, opts)
    _check_finds_planes(cfg, config)
    return cfg


def _config_path(config: str) -> Path:
    path = zoo_folder() / f"{config.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if config.endswith(".py") or path.with_suffix(".py").is_file():
        raise ModelError(f"config {config}: is Python code (a lazy config); only YAML configs can be used")
    if Path(config).is_file():
        return Path(config)
    near = difflib.get_close_matches(config, zoo_configs(), 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else "give a name such as COCO-Detection/faster_rcnn_R_50_FPN_3x"
    raise ModelError(f"config {config}: neither in Detectron2's model zoo nor a file; {hint}")


def apply_settings(cfg: Any, settings: Mapping[str, Any]) -> None:
    """Set ``KEY: value`` pairs, as Detectron2's ``opts`` do.

    Raises:
        ModelError: a key that does not exist (naming the nearest), a value of another type.
    """
    for key, value in settings.items():
        # SOLVER.BASE_LR 1 is meant as 1.0; yacs takes no int for a float.
        whole = isinstance(value, int) and not isinstance(value, bool)
        value = float(value) if whole and isinstance(_value_at(cfg, key), float) else value
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, AssertionError, ValueError, AttributeError) as error:
            near = difflib.get_close_matches(key, list(flat_config(cfg)), 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near and near[0] != key else ""
            raise ModelError(f"Detectron2 setting {key} {value}: {one_line(error, 160)}{hint}") from error


def _value_at(cfg: Any, key: str) -> Any:
    for field in key.split("."):
        cfg = cfg.get(field) if hasattr(cfg, "get") else None
    return cfg


def flat_config(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """All settings as ``SECTION.KEY`` -> value, tuples as lists."""
    flat: dict[str, Any] = {}
    for name, value in cfg.items():
        if hasattr(value, "items"):
            flat |= flat_config(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _check_finds_planes(cfg: Any, config: str) -> None:
    wants = None
    if cfg.MODEL.META_ARCHITECTURE not in ("GeneralizedRCNN", "RetinaNet"):
        wants = f"is a {cfg.MODEL.META_ARCHITECTURE}"
    elif cfg.MODEL.KEYPOINT_ON:
        wants = "finds keypoints"
    elif cfg.MODEL.LOAD_PROPOSALS or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        wants = "needs proposals made elsewhere"
    if wants:
        raise ModelError(f"config {config}: {wants}; planes need boxes or boxes with masks (Faster, Mask R-CNN, RetinaNet)")


def has_masks(cfg: Any) -> bool:
    """Whether the network of this config makes masks."""
    return bool(cfg.MODEL.MASK_ON) and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def detectron2_spec(
    config: str, cfg: Any, classes: Sequence[str], *, tiling: Tiling | None = None, rendering: Rendering = DEFAULT
) -> ModelSpec:
    """The model.json of a Detectron2 model: its settings where they differ from Detectron2's defaults."""
    from detectron2.config import get_cfg

    defaults = flat_config(get_cfg())
    changed = {k: v for k, v in flat_config(cfg).items() if k.startswith(SAVED) and v != defaults.get(k)}
    architecture = Detectron2Architecture(
        config=Path(config).name if Path(config).is_file() else config,
        settings={k: v for k, v in changed.items() if k not in NOT_SAVED},
    )
    return ModelSpec(
        kind="instance_segmenter" if has_masks(cfg) else "detector",
        engine="detectron2",
        architecture=architecture.model_dump(),
        classes=list(classes),
        versions={**library_versions(), "detectron2": detectron2_version()},
        tiling=tiling,
        rendering=rendering,
    )


def detectron2_version() -> str:
    """The installed version, "none" without one."""
    try:
        return version("detectron2")
    except PackageNotFoundError:
        return "none"


def build_network(cfg: Any, device: str) -> nn.Module:
    """The network of a config on a device, with fresh weights.

    Raises:
        ModelError: settings that do not fit together.
    """
    from detectron2.modeling import build_model

    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device if device == "meta" else pick_device(device)
    try:
        return build_model(cfg)
    except (AssertionError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"Detectron2 cannot build this network ({one_line(error, 200)})") from error


def load_detectron2(spec: ModelSpec, weights: Mapping[str, torch.Tensor], device: str) -> Detectron2Predictor:
    """Build the predictor of a saved Detectron2 model.

    Raises:
        EngineMissing: Detectron2 is not installed.
        ModelError: settings that this Detectron2 does not know, weights that do not fit.
    """
    require_detectron2()
    from detectron2.config import get_cfg

    architecture = parse_architecture(spec, Detectron2Architecture)
    cfg = get_cfg()
    apply_settings(cfg, architecture.settings)
    shapes = partial(build_network, cfg, "meta")
    model = build_fitting(partial(build_network, cfg, device), weights, f"Detectron2 {architecture.config}", shapes)
    return Detectron2Predictor(model, cfg)


class Detectron2Predictor:
    """Predictor over a Detectron2 network; equal to its DefaultPredictor to the bit on the CPU.

    Images go through one by one: padding a batch to a common size would change the
    predictions near the borders.
    """

    def __init__(self, model: nn.Module, cfg: Any) -> None:
        from detectron2.data.transforms import ResizeShortestEdge

        self.model = model.eval()
        self.format = cfg.INPUT.FORMAT
        self.masks = has_masks(cfg)
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    @timed("forward")
    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Detect planes in RGB uint8 images of any sizes; see `Predictor`."""
        return [self._one(str(i), image) for i, image in enumerate(images)]

    def _one(self, image_id: str, image: np.ndarray) -> Instances:
        from detectron2.modeling.postprocessing import detector_postprocess

        height, width = image.shape[:2]
        original = image[:, :, ::-1] if self.format == "BGR" else image
        resized = self.resize.get_transform(original).apply_image(original)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
        inputs = [{"image": tensor, "height": height, "width": width}]
        if not self.masks:
            output = self.model(inputs)[0]["instances"].to("cpu")
            return self._instances(image_id, height, width, output, None)
        network: Any = self.model
        raw = network.inference(inputs, do_postprocess=False)[0]
        boxes, masks = [detector_postprocess(raw[:0], height, width).to("cpu")], []
        boxes[0].remove("pred_masks")
        # Plane by plane: all masks of a large image together would fill the memory.
        for i in range(len(raw)):
            single = detector_postprocess(raw[i : i + 1], height, width).to("cpu")
            masks += [_mask_of(single, height, width)] if len(single) else []
            single.remove("pred_masks")
            boxes.append(single)
        return self._instances(image_id, height, width, type(raw).cat(boxes), masks)

    @staticmethod
    def _instances(image_id: str, height: int, width: int, output: Any, masks: list[RLE] | None) -> Instances:
        boxes = clip_boxes(output.pred_boxes.tensor.float().numpy(), height, width)
        keep = pixel_sized(boxes)
        scores, labels = output.scores.float().numpy(), output.pred_classes.numpy()
        kept = None if masks is None else [masks[i] for i in keep]
        return Instances.make(image_id, height, width, boxes[keep], scores[keep], labels=labels[keep], masks=kept)


def _mask_of(single: Any, height: int, width: int) -> RLE:
    x1, y1, x2, y2 = single.pred_boxes.tensor[0].tolist()
    # Detectron2 draws a mask no more than a pixel beyond its box.
    left, top, right, bottom = crop_window([x1 - 1, y1 - 1, x2 + 1, y2 + 1], height, width)
    return rle_paste(single.pred_masks[0, top:bottom, left:right].numpy(), left, top, height, width)
