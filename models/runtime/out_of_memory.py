"""Batches that do not fit into the device's memory are halved, until single images remain."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from models.errors import DataError
from models.instances import Instances
from models.predictor import Predictor


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the machine's or the device's, did not suffice."""
    # torch's own class is recognised by its name: merging tiles needs no torch.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def predict_in_halves(predictor: Predictor, images: Sequence[np.ndarray]) -> list[Instances]:
    """Predict a batch as ``predictor.predict`` does, in halves where it does not fit into memory.

    Raises:
        DataError: a single image does not fit.
    """
    try:
        return predictor.predict(images)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    if _freed():
        return predict_in_halves(predictor, images)
    if len(images) == 1:
        height, width = images[0].shape[:2]
        raise DataError(f"{width} x {height} pixels need more memory than there is; predict by tiles (--tile)", "too large")
    half = len(images) // 2
    predictions = predict_in_halves(predictor, images[:half]) + predict_in_halves(predictor, images[half:])
    return [instances.named(str(i)) for i, instances in enumerate(predictions)]


def _freed() -> bool:
    """Whether memory was held that the work can do without: recorded kernels of a GPU (`models.runtime.replay`)."""
    # Only where torch is used anyway.
    replay = sys.modules.get("models.runtime.replay")
    return replay is not None and replay.forget_recordings()
