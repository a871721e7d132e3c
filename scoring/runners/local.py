"""Runs a job in this process: images decoded ahead, predicted in batches."""

from __future__ import annotations

from collections.abc import Iterator

from models.instances import Instances
from models.predictor import Predictor
from models.tiling import tiling_of
from models.windows import AnyImage
from pipelines.data.dataset import Dataset, Sample
from pipelines.prediction import is_segmenter, predict_image
from scoring.reader import Failure, read_ahead


def predict_all(predictor: Predictor, dataset: Dataset, batch_size: int) -> Iterator[Instances | Failure]:
    """One result per image: images in = Instances + Failures out."""
    waiting: list[tuple[Sample, AnyImage]] = []
    for sample, image in read_ahead(dataset, max(2, batch_size), windows=tiling_of(predictor) is not None):
        if isinstance(image, Failure):
            yield image
            continue
        waiting.append((sample, image))
        if len(waiting) >= batch_size:
            yield from _predict(predictor, waiting)
            waiting = []
    if waiting:
        yield from _predict(predictor, waiting)


def _predict(predictor: Predictor, batch: list[tuple[Sample, AnyImage]]) -> list[Instances]:
    if is_segmenter(predictor):
        return [predict_image(predictor, image, sample) for sample, image in batch]
    found = predictor.predict([image for _, image in batch])
    return [f.named(sample.image_id) for f, (sample, _) in zip(found, batch, strict=True)]
