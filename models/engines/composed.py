"""A box detector and a crop segmenter as one instance segmenter; the saved folder holds both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.engines.unet.crops import CropSegmenter
from models.errors import ModelError
from models.geometry.box_pairs import pairs_among
from models.geometry.rle import CropMask, rle_paste
from models.instances import Instances
from models.predictor import Predictor
from models.saved.allowed_files import COMPONENTS
from models.saved.folder import write_folder
from models.saved.spec import ModelSpec, parse_architecture, read_spec

DETECTOR, SEGMENTER = COMPONENTS


class ComposedArchitecture(BaseModel):
    """How detector and segmenter work together."""

    model_config = ConfigDict(extra="forbid")

    overlaps: Literal["exclusive", "keep"] = Field(
        default="exclusive",
        description="exclusive gives each pixel to the plane of the higher score, keep leaves masks as they are.",
    )
    min_score: float = Field(default=0.0, ge=0, le=1, description="Least score of a detection to be segmented.")


class ComposedPredictor:
    """Detects planes, segments all boxes of all images together in large batches, pastes the masks back."""

    def __init__(self, detector: Predictor, segmenter: CropSegmenter, architecture: ComposedArchitecture) -> None:
        self.detector, self.segmenter, self.architecture = detector, segmenter, architecture

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Planes with masks in RGB uint8 images of any sizes; see `Predictor`.

        Detections whose mask has no pixel left are dropped.
        """
        detections = [d.above(self.architecture.min_score) for d in self.detector.predict(images)]
        cropped = self.segmenter.crop_masks(images, [d.boxes for d in detections])
        return [self._with_masks(d, crops) for d, crops in zip(detections, cropped, strict=True)]

    def _with_masks(self, detections: Instances, crops: Sequence[CropMask]) -> Instances:
        # Detections come best score first.
        if self.architecture.overlaps == "exclusive":
            crops = without_overlaps(crops)
        keep = [i for i, crop in enumerate(crops) if crop.mask.any()]
        masks = tuple(rle_paste(*crops[i], detections.height, detections.width) for i in keep)
        return replace(detections.take(np.array(keep, np.int64)), masks=masks)


def without_overlaps(crops: Sequence[CropMask]) -> list[CropMask]:
    """The masks with each pixel left to the first one that covers it; no dense mask of the image is made."""
    windows = np.array([[c.left, c.top, c.left + c.mask.shape[1], c.top + c.mask.shape[0]] for c in crops], np.int64)
    result = [CropMask(c.mask.copy(), c.left, c.top) for c in crops]
    first, second = pairs_among(windows.reshape(-1, 4))
    first, second = np.minimum(first, second), np.maximum(first, second)
    # A plane loses what better ones cover, whole: what those lost went to still better ones.
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        left, top = np.maximum(windows[a, :2], windows[b, :2])
        right, bottom = np.minimum(windows[a, 2:], windows[b, 2:])
        if left < right and top < bottom:
            mine = result[b].mask[
                top - windows[b, 1] : bottom - windows[b, 1], left - windows[b, 0] : right - windows[b, 0]
            ]
            mine &= ~crops[a].mask[
                top - windows[a, 1] : bottom - windows[a, 1], left - windows[a, 0] : right - windows[a, 0]
            ]
    return result


def save_composed(
    folder: str | Path,
    detector: str | Path,
    segmenter: str | Path,
    architecture: ComposedArchitecture,
    *,
    components: Mapping[str, str],
) -> Path:
    """Write a folder that holds copies of both saved folders, whole or not at all.

    Args:
        components: the version that each comes from, such as ``{"detector": "planes-det/3"}``.

    Raises:
        ModelError: a component of the wrong kind, or a folder that cannot be written.
    """
    specs = {DETECTOR: read_spec(detector), SEGMENTER: read_spec(segmenter)}
    for role, spec in specs.items():
        if spec.kind != role:
            raise ModelError(f"{components.get(role, role)}: is a {spec.kind}, a {role} is needed")
    if specs[DETECTOR].rendering != specs[SEGMENTER].rendering:
        shown = ", ".join(f"{components.get(role, role)} {spec.rendering.model_dump()}" for role, spec in specs.items())
        raise ModelError(
            f"detector and segmenter read image files differently ({shown}); "
            "train them with the same data.range and data.bands"
        )
    classes = specs[DETECTOR].classes
    if [c.lower() for c in classes] != [c.lower() for c in specs[SEGMENTER].classes]:
        shown = ", ".join(f"{components.get(role, role)} finds {', '.join(spec.classes)}" for role, spec in specs.items())
        raise ModelError(f"detector and segmenter are of different classes ({shown})")
    versions = {f"{role}.{k}": v for role, spec in specs.items() for k, v in spec.versions.items()}
    made = ModelSpec(
        kind="instance_segmenter",
        engine="composed",
        architecture=architecture.model_dump(),
        classes=classes,
        rendering=specs[DETECTOR].rendering,
        scores=specs[DETECTOR].scores,
        versions={**versions, **{f"{role}.version": name for role, name in components.items()}},
    )

    def fill(into: Path) -> None:
        for role, source in ((DETECTOR, detector), (SEGMENTER, segmenter)):
            shutil.copytree(source, into / role)

    return write_folder(folder, made, fill)


def load_composed(
    spec: ModelSpec, folder: Path, *, device: str, tiling: Mapping[str, Any] | None, load: Callable[..., Predictor]
) -> ComposedPredictor:
    """Build the predictor of a saved composition from the folders inside it.

    Args:
        tiling: settings for the detector, see `models.loading.load_model`.
        load: that function, which loads the components.

    Raises:
        ModelError: a component is missing, damaged or of the wrong kind.
        EngineMissing: the detector needs a library that is not installed.
    """
    architecture = parse_architecture(spec, ComposedArchitecture)
    for role in (DETECTOR, SEGMENTER):
        kind = read_spec(folder / role).kind
        if kind != role:
            raise ModelError(f"{folder / role}: is a {kind}, a {role} is needed")
    segmenter = load(folder / SEGMENTER, device)
    if not isinstance(segmenter, CropSegmenter):
        raise ModelError(f"{folder / SEGMENTER}: outlines no crops")
    return ComposedPredictor(load(folder / DETECTOR, device, tiling), segmenter, architecture)
