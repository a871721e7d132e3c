"""The course's Kaggle submission (and the Airbus convention) made from the instance table, and read back.

Course: runs go along the rows and count pixels from 0. Airbus (the common one
elsewhere): runs go down the columns and count from 1. Masks are never made dense at
the image's size: runs come from the mask's own part of the image.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from models.errors import DataError
from models.geometry.rle import mask_runs, rle_area, rle_boxes, rle_crop, rle_from_runs, rle_paste
from models.instances import RLE, Instances
from pipelines.data.dataset import Dataset
from pipelines.files import replacing
from scoring.requests import Convention
from scoring.writers.walk import side_by_side

HEADER = ("ImageId", "EncodedPixels")
NOTHING = "[]"


def write_submission(
    predictions: Iterable[Instances], dataset: Dataset, path: Path, convention: Convention = "course"
) -> None:
    """Write one row per plane with a mask, best score first, images in the data set's order.

    ``ImageId`` is the file name without its ending; an image without planes has one
    row with an empty list. Planes without a pixel have no row.
    """
    names = submission_names(dataset)
    with replacing(path) as temporary, open(temporary, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(HEADER)
        for sample, one in side_by_side(predictions, dataset):
            masks = () if one is None else one.masks or ()
            rows = [encode_mask(mask, convention) for mask in masks]
            for text in [row for row in rows if row] or [NOTHING]:
                writer.writerow((names[sample.image_id], text))


def submission_names(dataset: Dataset) -> dict[str, str]:
    """Image id -> ``ImageId``: the file name without its ending; the path below the common folder where two share one.

    With its ending where even that is shared.
    """
    stems = Counter(s.path.stem for s in dataset.samples)
    names = {
        s.image_id: s.path.stem if stems[s.path.stem] == 1 else s.image_id.removesuffix(s.path.suffix)
        for s in dataset.samples
    }
    counts = Counter(names.values())
    return {image_id: name if counts[name] == 1 else image_id for image_id, name in names.items()}


def encode_mask(rle: RLE, convention: Convention = "course") -> str:
    """``start length start length ...`` of a mask; empty for a mask without pixels.

    >>> encode_mask(rle_paste(np.array([[1, 1], [0, 1]]), 1, 0, 3, 4))
    '1 2 6 1'
    >>> encode_mask(rle_paste(np.array([[1, 1], [0, 1]]), 1, 0, 3, 4), "airbus")
    '4 1 7 2'
    """
    if not rle_area([rle])[0]:
        return ""
    height, width = rle["size"]
    mask, left, top = rle_crop(rle)
    if convention == "course":
        starts, lengths = mask_runs(mask, left, top, width)
    else:
        starts, lengths = mask_runs(mask.T, top, left, height)
        starts = starts + 1
    return " ".join(map(str, np.stack([starts, lengths], axis=1).ravel().tolist()))


def decode_mask(text: str, height: int, width: int, convention: Convention = "course") -> RLE:
    """Inverse of `encode_mask` for an image of ``height`` x ``width`` pixels.

    Raises:
        ValueError: odd count, not whole numbers, not ascending, or outside the image.
    """
    try:
        numbers = np.array([int(number) for number in text.split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"not whole numbers of pixels: {text[:40]!r}") from error
    if len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers, expected pairs of start and length")
    starts, lengths = numbers[::2] - (convention == "airbus"), numbers[1::2]
    # Before they are added up: a sum may not fit into its number.
    if len(numbers) and numbers.max() > height * width:
        raise ValueError(f"a number of {numbers.max()}, the image has {height * width} pixels")
    if (lengths < 1).any() or (starts < 0).any() or (starts[1:] < (starts + lengths)[:-1]).any():
        raise ValueError("runs must be ascending, apart and at least one pixel long")
    if len(starts) and starts[-1] + lengths[-1] > height * width:
        raise ValueError(f"runs reach pixel {starts[-1] + lengths[-1] - 1}, the image has {height * width}")
    if convention == "airbus":
        return rle_from_runs(starts, lengths, height, width)
    pixels = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(lengths.sum())
    rows, columns = np.divmod(pixels, width)
    if not len(rows):
        return rle_from_runs(starts, lengths, height, width)
    top, left = int(rows.min()), int(columns.min())
    mask = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), bool)
    mask[rows - top, columns - left] = True
    return rle_paste(mask, left, top, height, width)


def read_submission(path: Path, dataset: Dataset, convention: Convention = "course") -> list[Instances]:
    """Read a submission over the images of a data set.

    A submission has no scores: earlier rows count as better ones, image by image. So
    for a single image its AP is that of the table it was made from; over several
    images the ranking between them is lost.

    Raises:
        DataError: another header, an image that the data does not have, or a row that cannot be read.
    """
    names = submission_names(dataset)
    samples = {names[s.image_id]: s for s in dataset.samples}
    sizes: dict[str, tuple[int, int]] = {}
    masks: dict[str, list[RLE]] = {}
    for number, name, text in _rows(path):
        sample = samples.get(name)
        if sample is None:
            raise DataError(f"{path}: line {number}: image {name!r} is not in {dataset.name}/{dataset.split}")
        planes = masks.setdefault(sample.image_id, [])
        if sample.image_id not in sizes:
            sizes[sample.image_id] = sample.size()
        if text.strip() == NOTHING:
            continue
        try:
            planes.append(decode_mask(text, *sizes[sample.image_id], convention))
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}; is --rle {convention} right?") from error
    return [_instances(image_id, sizes, of_image) for image_id, of_image in masks.items()]


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    # A large plane's runs are longer than csv's usual limit.
    csv.field_size_limit(1_000_000_000)
    try:
        with open(path, newline="") as handle:
            reader = csv.reader(handle)
            header = tuple(next(reader, ()))
            if header != HEADER:
                raise DataError(f"{path}: header {','.join(header)[:60]!r}, expected {','.join(HEADER)!r}")
            for row in reader:
                if len(row) != 2:
                    raise DataError(f"{path}: line {reader.line_num}: {len(row)} fields, expected 2")
                yield reader.line_num, row[0], row[1]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _instances(image_id: str, sizes: Mapping[str, tuple[int, int]], masks: Sequence[RLE]) -> Instances:
    height, width = sizes[image_id]
    scores = 1 - np.arange(len(masks)) / (len(masks) + 1) * 0.5
    return Instances.make(image_id, height, width, rle_boxes(masks), scores, masks=masks)
