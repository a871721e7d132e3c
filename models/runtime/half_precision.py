"""A PyTorch predictor whose networks run in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.instances import RLE, Instances
from models.predictor import BoxSegmenter, Predictor
from models.runtime.devices import Precision, precision


class HalfPrecision:
    """A predictor under `models.runtime.devices.precision`."""

    def __init__(self, predictor: Predictor, device: str, kind: Precision) -> None:
        self.predictor, self.device, self.kind = predictor, device, kind

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """See `Predictor`."""
        with precision(self.device, self.kind):
            return self.predictor.predict(images)


class HalfPrecisionSegmenter(HalfPrecision):
    """The same of a predictor that outlines what is in given boxes."""

    def masks_in_boxes(self, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[list[RLE]]:
        """See `BoxSegmenter`."""
        assert isinstance(self.predictor, BoxSegmenter)
        with precision(self.device, self.kind):
            return self.predictor.masks_in_boxes(images, boxes)


def in_precision(predictor: Predictor, device: str, kind: Precision) -> HalfPrecision:
    """The predictor, whose networks it shares, in another precision."""
    wrapped = HalfPrecisionSegmenter if isinstance(predictor, BoxSegmenter) else HalfPrecision
    return wrapped(predictor, device, kind)
