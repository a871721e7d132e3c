"""Pictures of a sample of the scored images, made from the instance table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from models.geometry.rescaling import rescaled, rescaled_mask
from models.images.windows import open_image, shrunk
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.drawing import draw_instances, draw_truth
from scoring.writers.walk import file_stem, remove_earlier

SHOWN_SCORE = 0.5
# Longer side of a picture; larger images are shrunk to it.
MOST_PIXELS = 4096


def write_overlays(table: Iterable[Instances], dataset: Dataset, folder: Path, most: int) -> None:
    """Draw up to ``most`` images, spread over the data set: truth green, predictions orange."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_earlier(dataset, folder, ".jpg")
    step = max(1, len(dataset) // most)
    # Where one of those that are spread evenly cannot be read, the next one stands in.
    spread = [s for first in range(min(step, 10)) for s in dataset.samples[first::step][:most]]
    wanted = {s.image_id for s in spread}
    by_id = {f.image_id: f for f in table if f.image_id in wanted}
    drawn = 0
    for sample in spread:
        if drawn == most:
            break
        # The planes of a lost image lie in pixels that nobody has.
        if sample.lost:
            continue
        try:
            opened = open_image(sample.path, sample.rendering)
            image = shrunk(opened, MOST_PIXELS)
        except Exception:
            # A decoder may raise anything on a damaged file; the table of errors says what is wrong with it.
            continue
        # Planes of a shrunken image are small: thick lines and large numbers would hide them.
        line = 1 if image.shape[0] < opened.shape[0] else None
        canvas = draw_truth(image, _shrunk_truth(sample, image), line) if sample.truth else image
        if sample.image_id in by_id:
            instances = rescaled(by_id[sample.image_id].above(SHOWN_SCORE), *image.shape[:2])
            canvas = draw_instances(canvas, instances, line)
        path = folder / f"{file_stem(sample.image_id)}.jpg"
        if not cv2.imwrite(str(path), cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90]):
            raise OSError(f"{path} cannot be written")
        drawn += 1


def _shrunk_truth(sample: Sample, image: np.ndarray) -> Sample:
    height, width = image.shape[:2]
    if (height, width) == (sample.height, sample.width):
        return sample
    scale = np.array([width / sample.width, height / sample.height] * 2, np.float32)
    masks = tuple(None if m is None else rescaled_mask(m, scale, height, width) for m in sample.masks)
    return replace(sample, boxes=sample.boxes * scale, masks=masks)
