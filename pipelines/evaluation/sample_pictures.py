"""Pictures of the same few images of a data set each time it is predicted, truth and prediction drawn in."""

from __future__ import annotations

import numpy as np

from models.geometry.boxes import crop_window
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.drawing import Window, draw_window

# Pictures of a data set, and the side in pixels of a detector's: a few hundred kilobytes each.
MOST, SIDE = 3, 384
# Side in pixels that a segmenter's crop is enlarged to, and the share of its box that is shown around it.
CROP_SIDE, CROP_MARGIN = 256, 0.25
SHOWN_SCORE = 0.5


class SamplePictures:
    """Called with each image and its predictions (`predict_dataset`), it draws those that were chosen beforehand.

    The choice depends on the data set alone, so that pictures of one name show one place, whatever model predicts it:
    up to ``most`` images with planes, spread over the data set, of each the part around its first plane.

    Args:
        dataset: what is predicted.
        crops: show a plane's crop, as a segmenter sees it, in place of a part of the scene.
        name: that the pictures' names begin with; they are numbered from 1.
    """

    def __init__(self, dataset: Dataset, *, crops: bool, name: str, most: int = MOST) -> None:
        self._crops, self._drawn = crops, dict[str, np.ndarray]()
        known = [s for s in dataset.samples if not s.lost and len(s.outlined if crops else np.flatnonzero(~s.crowd))]
        chosen = [known[i * len(known) // most] for i in range(most)] if len(known) > most else known
        self._names = {s.image_id: f"{name}_{i}" for i, s in enumerate(chosen, start=1)}

    def __call__(self, image: np.ndarray, sample: Sample, instances: Instances) -> None:
        """Draw an image (RGB uint8 (H, W, 3)) if it is one of the chosen ones."""
        name = self._names.get(sample.image_id)
        if name is None:
            return
        if self._crops:
            window, side = (
                crop_window(sample.boxes[sample.outlined[0]], image.shape[0], image.shape[1], CROP_MARGIN),
                CROP_SIDE,
            )
        else:
            window, side = _around(sample.boxes[np.flatnonzero(~sample.crowd)[0]], *image.shape[:2]), None
        self._drawn[name] = draw_window(image, window, sample, instances.above(SHOWN_SCORE), side)

    def take(self) -> dict[str, np.ndarray]:
        """RGB uint8 (H, W, 3) pictures by name, of images that were predicted since the last call."""
        taken, self._drawn = self._drawn, {}
        return taken


def _around(box: np.ndarray, height: int, width: int) -> Window:
    """The window of `SIDE` pixels a side, or of the image's where that is smaller, that has a box (xyxy) in its middle."""
    wide, high = min(SIDE, width), min(SIDE, height)
    x1 = min(max(round(float(box[0] + box[2]) / 2) - wide // 2, 0), width - wide)
    y1 = min(max(round(float(box[1] + box[3]) / 2) - high // 2, 0), height - high)
    return x1, y1, x1 + wide, y1 + high
