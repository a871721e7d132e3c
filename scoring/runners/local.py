"""Runs a job in this process: images decoded ahead, predicted in batches that never cross a shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from models.errors import DataError, one_line
from models.instances import Instances
from models.predictor import Predictor
from models.tiling import tiling_of
from models.windows import AnyImage
from pipelines.data.dataset import Sample
from pipelines.prediction import is_segmenter, predict_image
from scoring.reader import Failure, read_ahead


def predict_shards(
    predictor: Predictor, shards: Sequence[Sequence[Sample]], batch_size: int, workers: int = 1
) -> Iterator[tuple[int, Instances | Failure]]:
    """(position of the shard, result) for every image, shard by shard: images in = Instances + Failures out.

    What a batch holds depends on nothing but its shard, so that a shard made again is the same.
    """
    owner = [i for i, shard in enumerate(shards) for _ in shard]
    waiting: list[tuple[Sample, AnyImage]] = []
    samples = (sample for shard in shards for sample in shard)
    ahead = max(2, batch_size, workers)
    images = read_ahead(samples, ahead, tiling_of(predictor) is not None, workers)
    for position, (sample, image) in enumerate(images):
        shard = owner[position]
        if isinstance(image, Failure):
            yield shard, image
        else:
            waiting.append((sample, image))
        last = position + 1 == len(owner) or owner[position + 1] != shard
        if waiting and (last or len(waiting) >= batch_size):
            for result in _predict(predictor, waiting):
                yield shard, result
            waiting = []


def _predict(predictor: Predictor, batch: list[tuple[Sample, AnyImage]]) -> list[Instances | Failure]:
    if is_segmenter(predictor):
        return [predict_image(predictor, image, sample) for sample, image in batch]
    try:
        found = predictor.predict([image for _, image in batch])
    except DataError as error:
        # A large file is read while it is predicted, and may turn out damaged only then.
        if len(batch) > 1:
            return [result for one in batch for result in _predict(predictor, [one])]
        sample = batch[0][0]
        return [Failure(sample.image_id, str(sample.path), error.kind, one_line(error))]
    return [f.named(sample.image_id) for f, (sample, _) in zip(found, batch, strict=True)]
