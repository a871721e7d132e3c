"""The protocols of predictors: detectors, and segmenters that need boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from models.instances import RLE, Instances


@runtime_checkable
class Predictor(Protocol):
    """Anything that finds planes; no base class and no registration needed."""

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """One Instances per RGB uint8 (H, W, 3) image, in order, with ``image_id`` "0", "1", ..."""
        ...


@runtime_checkable
class BoxSegmenter(Protocol):
    """Anything that outlines the plane in each given box."""

    def masks_in_boxes(self, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[list[RLE]]:
        """One mask per box: ``boxes[i]`` is xyxy (N_i, 4) in ``images[i]``; RLE of the image's size, in order."""
        ...
