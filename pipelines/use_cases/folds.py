"""Folds of all annotated images of a source, each held back once."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from models.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.data.readers.opening import open_dataset, splits_of
from pipelines.data.scene_groups import scene_folds, with_joined_scenes
from pipelines.progress import Progress, pass_through
from pipelines.recipes.settings import DataSettings

log = logging.getLogger(__name__)


def open_annotated(where: str, settings: DataSettings) -> Dataset:
    """All annotated splits of a folder as one data set, or a JSON file; images that cannot be read stay in it.

    Raises:
        DataError: nothing annotated there.
    """
    opened = partial(open_dataset, where, category=settings.category, scene_pattern=settings.scene_pattern, keep=True)
    if Path(where).is_dir():
        splits = []
        for split in splits_of(Path(where)):
            if opened(split).has_truth:
                splits.append(split)
            else:
                log.info(f"{where}: split {split} has no ground truth and is in no fold")
        dataset = opened("+".join(splits)) if splits else None
    else:
        dataset = opened("all")
    if dataset is None or not dataset.has_truth or not dataset.planes:
        raise DataError(f"{where}: no annotated planes to make folds of (expected train_coco.json or train.json)")
    return dataset.rendered(settings.rendering)


class Folds:
    """The folds of a source by the settings of a recipe; read once for all recipes with equal settings."""

    def __init__(self, where: str, count: int, progress: Progress = pass_through) -> None:
        self.where, self.count, self._progress = where, count, progress
        self._known: dict[str, tuple[Dataset, list[Dataset]]] = {}

    def of(self, settings: DataSettings) -> tuple[Dataset, list[Dataset]]:
        """All images, their scenes joined where they show the same ground, and the folds of them.

        Raises:
            DataError: nothing annotated, or fewer scenes than folds.
        """
        key = settings.model_dump_json()
        if key not in self._known:
            dataset = open_annotated(self.where, settings)
            log.info(dataset.summary())
            joined = with_joined_scenes(dataset, self._progress)
            self._known[key] = joined, scene_folds(joined, self.count)
        return self._known[key]

    def without(self, settings: DataSettings, fold: int) -> tuple[Dataset, Dataset]:
        """The images outside a fold (counted from 1), and those of the fold.

        Raises:
            DataError: as `of`, or no planes outside the fold.
        """
        everything, folds = self.of(settings)
        held_out = {s.image_id for s in folds[fold - 1].samples}
        rest = everything.subset((s.image_id for s in everything.samples if s.image_id not in held_out), "train")
        if not rest.planes:
            raise DataError(f"{self.where}: all planes are in fold {fold} of {self.count}; give fewer folds")
        return rest, folds[fold - 1]
