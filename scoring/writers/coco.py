"""COCO results JSON made from the instance table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from models.geometry.boxes import xyxy_to_xywh
from models.geometry.rle import rle_text
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.files import replacing


def write_results(predictions: Iterable[Instances], dataset: Dataset, path: Path) -> None:
    """Write COCO results; image and category ids are those of the source's COCO file.

    Where the source has no ids, or two images share one (of two splits, say), images are numbered from 1 in
    their order and ``file_name`` tells which is which.
    """
    with replacing(path) as temporary, open(temporary, "w") as handle:
        handle.write("[")
        for i, entry in enumerate(_entries(predictions, dataset)):
            handle.write((", " if i else "") + json.dumps(entry))
        handle.write("]")


def _named(sample: Sample) -> str:
    """The file's name, below folders where only they tell it from others."""
    folder, _, _ = sample.image_id.rpartition("/")
    return f"{folder}/{sample.path.name}" if folder else sample.path.name


def _entries(predictions: Iterable[Instances], dataset: Dataset) -> Iterator[dict[str, Any]]:
    numbers = [s.number for s in dataset.samples]
    own = None not in numbers and len(set(numbers)) == len(numbers)
    sources = {s.image_id: (s.number if own else i, s) for i, s in enumerate(dataset.samples, start=1)}
    for one in predictions:
        number, sample = sources[one.image_id]
        for i, box in enumerate(xyxy_to_xywh(one.boxes)):
            entry: dict[str, Any] = {
                "image_id": number,
                "file_name": sample.path.name if own else _named(sample),
                # A model's classes are numbered from 0; where there is truth, it has but one.
                "category_id": dataset.category_id + int(one.labels[i]),
                "bbox": [round(float(v), 3) for v in box],
                "score": round(float(one.scores[i]), 6),
            }
            if one.masks is not None:
                entry["segmentation"] = rle_text(one.masks[i])
            yield entry
