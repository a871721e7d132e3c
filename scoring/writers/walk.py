"""An instance table and its data set walked through side by side, so that memory holds one image's planes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from models.errors import DataError
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.files import quoted_name


def file_stem(image_id: str) -> str:
    """An image's id as the name of a file; quoted, so that those of "a/b" and "a_b" differ, and "a%2Fb"."""
    quoted = any(sign in image_id for sign in ("/", "%2F", "%25"))
    return quoted_name(image_id) if quoted else image_id


def remove_earlier(dataset: Dataset, folder: Path, ending: str) -> None:
    """Remove the files that an earlier export made of these images, so that none of them stays among the new ones."""
    earlier = {path.name: path for path in folder.glob(f"*{ending}")} if folder.is_dir() else {}
    if earlier:
        for sample in dataset.samples:
            path = earlier.pop(f"{file_stem(sample.image_id)}{ending}", None)
            if path is not None:
                path.unlink()


def side_by_side(predictions: Iterable[Instances], dataset: Dataset) -> Iterator[tuple[Sample, Instances | None]]:
    """Every sample with its predictions, None where the table has no row of it.

    Raises:
        DataError: the table is not in the data set's order, or has an image that the data set has not.
    """
    rest = iter(predictions)
    one = next(rest, None)
    for sample in dataset.samples:
        if one is not None and one.image_id == sample.image_id:
            yield sample, one
            one = next(rest, None)
        else:
            yield sample, None
    if one is not None:
        raise DataError(
            f"image {one.image_id!r} of the table is not in {dataset.name}/{dataset.split}, or not in its order"
        )
