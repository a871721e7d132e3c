"""COCO results JSON made from the instance table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from models.geometry import rle_text, xyxy_to_xywh
from models.instances import Instances
from pipelines.data.dataset import Dataset


def write_results(found: Sequence[Instances], dataset: Dataset, path: Path) -> None:
    """Write COCO results; image and category ids are those of the source's COCO file.

    Where the source has no ids, images are numbered from 1 in their order and
    ``file_name`` tells which is which.
    """
    numbers = {s.image_id: i if s.number is None else s.number for i, s in enumerate(dataset.samples, start=1)}
    names = {s.image_id: s.path.name for s in dataset.samples}
    results = []
    for one in found:
        for i, box in enumerate(xyxy_to_xywh(one.boxes)):
            entry = {
                "image_id": numbers[one.image_id],
                "file_name": names[one.image_id],
                "category_id": dataset.category_id,
                "bbox": [round(float(v), 3) for v in box],
                "score": round(float(one.scores[i]), 6),
            }
            if one.masks is not None:
                entry["segmentation"] = rle_text(one.masks[i])
            results.append(entry)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(results))
    os.replace(temporary, path)
