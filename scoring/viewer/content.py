"""What the page shows of a job: its images, their planes, and where they differ from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from models.errors import DataError, one_line
from models.geometry.boxes import box_iou
from models.geometry.rle import rle_crop
from models.images.windows import open_image, shrunk
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.matching import match_image
from scoring.jobs.manifest import read_inputs, read_manifest
from scoring.jobs.shards import ERRORS, INSTANCES
from scoring.writers import parquet

# More images would make the page's list slow.
MOST_IMAGES = 20_000
# Longest side of a picture that is sent, in pixels.
MOST_PIXELS = 2048
# Areas from which planes are medium and large, as COCO has them.
SIZES = (32**2, 96**2)


class Job:
    """A finished job's images and planes, and their truth where a data set is given.

    Args:
        folder: that a scoring left.
        data: data set with annotations of the same images.
        split: of it.

    Raises:
        DataError: not the folder of a finished scoring, or none of the data set's images is in it.
    """

    def __init__(self, folder: Path, data: str | None = None, split: str = "test") -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        inputs = read_inputs(folder, self.manifest)
        if not (folder / INSTANCES).exists():
            raise DataError(f"{folder}: the scoring is not finished; the same score command goes on with it")
        self.all_images = len(inputs)
        samples = list(inputs.samples[:MOST_IMAGES])
        if data is not None:
            samples = _with_truth(samples, open_dataset(data, split, category=self.manifest.category, keep=True), folder)
        self.samples = samples
        shown = {s.image_id for s in samples}
        self._found = {one.image_id: one for one in parquet.InstanceTable(folder / INSTANCES) if one.image_id in shown}
        if data is not None:
            self._check(folder)
        try:
            self._failed = {f.image_id: f.message for f in parquet.read_failures(folder / ERRORS)}
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{folder / ERRORS}: cannot be read ({one_line(error, 160)}); score with --fresh") from error
        if not self.is_current():
            raise DataError(f"{folder}: was updated meanwhile; call again")
        self.has_truth = data is not None

    def is_current(self) -> bool:
        """Whether the folder still holds this job, as it was."""
        try:
            return read_manifest(self.folder) == self.manifest
        except DataError:
            return False

    def _check(self, folder: Path) -> None:
        """Refuse what cannot be judged."""
        if any(one.labels.any() for one in self._found.values()):
            raise DataError(f"{folder}: its version knows several classes; leave --data away, which is of one")
        for sample in self.samples:
            one = self._found.get(sample.image_id)
            if (
                one is not None
                and sample.truth
                and not sample.lost
                and (one.height, one.width) != (sample.height, sample.width)
            ):
                sizes = f"{one.width}x{one.height}, its annotation says {sample.width}x{sample.height}"
                raise DataError(f"{folder}: image {sample.image_id!r} was scored at {sizes}; give the data that was scored")

    def overview(self) -> dict[str, Any]:
        """The list of images: id, failure, and of each plane score, size (0 small, 1 medium, 2 large), class and state."""
        return {
            "label": self.manifest.label,
            "category": self.manifest.category,
            "threshold": self.manifest.settings.get("score_threshold", 0.0),
            "truth": self.has_truth,
            "all": self.all_images,
            "images": [self._summary(sample) for sample in self.samples],
        }

    def _summary(self, sample: Sample) -> dict[str, Any]:
        found = self._of(sample)
        state, missed = self._judged(sample, found)
        return {
            "id": sample.image_id,
            "failed": self._failed.get(sample.image_id, ""),
            "scores": [round(float(s), 4) for s in found.scores],
            "sizes": np.digitize(_areas(found), SIZES).tolist(),
            "labels": found.labels.tolist(),
            "state": state,
            "missed": len(missed),
        }

    def image(self, number: int) -> dict[str, Any]:
        """Everything of one image: size, boxes, outlines, and what was missed, in its pixels."""
        sample = self.samples[number]
        found = self._of(sample)
        state, missed = self._judged(sample, found)
        height, width = (found.height, found.width) if len(found) or not sample.height else (sample.height, sample.width)
        return {
            "id": sample.image_id,
            "path": str(sample.path),
            "failed": self._failed.get(sample.image_id, ""),
            "height": height,
            "width": width,
            "boxes": found.boxes.round(2).tolist(),
            "scores": [round(float(s), 4) for s in found.scores],
            "sizes": np.digitize(_areas(found), SIZES).tolist(),
            "labels": found.labels.tolist(),
            "outlines": [outlines(found, i) for i in range(len(found))],
            "state": state,
            "missed": sample.boxes[missed].round(2).tolist(),
        }

    def picture(self, number: int) -> tuple[bytes, int, int]:
        """The image as JPEG, shrunk where it is large, and the (height, width) of the whole.

        Raises:
            DataError: it cannot be read.
        """
        sample = self.samples[number]
        opened = sample.part_of(open_image(sample.path, sample.rendering))
        small = shrunk(opened, MOST_PIXELS)
        done, content = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
        if not done:
            raise DataError(f"{sample.path}: cannot be shown")
        return content.tobytes(), int(opened.shape[0]), int(opened.shape[1])

    def _of(self, sample: Sample) -> Instances:
        found = self._found.get(sample.image_id)
        return found if found is not None else Instances.empty(sample.image_id, sample.height, sample.width)

    def _judged(self, sample: Sample, found: Instances) -> tuple[list[str], list[int]]:
        """State of each plane (right, wrong, not judged) at an IoU of 0.5, and indices of those that were missed."""
        if not self.has_truth or not sample.truth:
            return [""] * len(found), []
        match = match_image(sample, found)
        correct, ignored = match.correct[0], match.ignored[0]
        judged = ["right" if c else "" if i else "wrong" for c, i in zip(correct, ignored, strict=True)]
        # Of an image COCO judges the hundred surest.
        state = judged + [""] * (len(found) - len(judged))
        return state, _missed(sample, found.boxes[np.flatnonzero(correct)])


def _missed(sample: Sample, boxes: np.ndarray) -> list[int]:
    """Planes of the truth that none of the right boxes, the surest first, takes; each takes one, as COCO matches them."""
    planes = [int(i) for i in np.flatnonzero(~sample.crowd)]
    if not planes or not len(boxes):
        return planes
    overlaps = box_iou(boxes, sample.boxes[planes])
    free = np.ones(len(planes), bool)
    for row in overlaps:
        free[int(np.where(free, row, -1.0).argmax())] = False
    return [plane for plane, left in zip(planes, free, strict=True) if left]


def _with_truth(samples: Sequence[Sample], dataset: Dataset, folder: Path) -> list[Sample]:
    known = {s.image_id: s for s in dataset.samples}
    if not dataset.has_truth:
        raise DataError(f"{dataset.name}/{dataset.split}: no annotations to look at errors by; leave --data away")
    if not any(s.image_id in known for s in samples):
        raise DataError(f"{folder}: none of its images is in {dataset.name}/{dataset.split}")
    # Read as the job read them.
    return [_annotated(s, known[s.image_id]) if s.image_id in known else s for s in samples]


def _annotated(sample: Sample, truth: Sample) -> Sample:
    return replace(
        sample,
        boxes=truth.boxes,
        masks=truth.masks,
        crowd=truth.crowd,
        truth=True,
        height=truth.height,
        width=truth.width,
        lost=truth.lost,
    )


def _areas(found: Instances) -> np.ndarray:
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    return sides[:, 0] * sides[:, 1]


def outlines(found: Instances, i: int) -> list[list[list[int]]]:
    """The mask of a plane as polygons in pixels of the image; none where it has no mask."""
    crop = None if found.masks is None else rle_crop(found.masks[i])
    if crop is None or not crop.mask.size:
        return []
    contours, _ = cv2.findContours(crop.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    moved = (contour[:, 0, :] + (crop.left, crop.top) for contour in contours)
    return [contour.tolist() for contour in moved]
