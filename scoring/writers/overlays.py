"""Pictures of a sample of the scored images, made from the instance table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2

from models.errors import DataError
from models.image import read_image
from models.instances import Instances
from pipelines.data.dataset import Dataset
from pipelines.figures import draw_instances, draw_truth

SHOWN_SCORE = 0.5


def write_overlays(found: Sequence[Instances], dataset: Dataset, folder: Path, most: int) -> None:
    """Draw up to ``most`` images, spread over the data set: truth green, predictions orange."""
    folder.mkdir(parents=True, exist_ok=True)
    by_id = {f.image_id: f for f in found}
    step = max(1, len(dataset) // most)
    for sample in dataset.samples[::step][:most]:
        try:
            image = read_image(sample.path)
        except DataError:
            continue
        canvas = draw_truth(image, sample) if sample.truth else image
        if sample.image_id in by_id:
            canvas = draw_instances(canvas, by_id[sample.image_id].above(SHOWN_SCORE))
        path = folder / f"{sample.image_id.replace('/', '_')}.jpg"
        if not cv2.imwrite(str(path), cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90]):
            raise OSError(f"{path} cannot be written")
