"""Anchor sizes from the data: ``anchor_sizes: auto`` of a recipe becomes numbers before it is trained."""

from __future__ import annotations

import logging

import numpy as np

from models.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.data.loading.augment import plane_scale
from pipelines.recipes.settings import DetectorRecipe, MaskRecipe, Recipe

log = logging.getLogger(__name__)

# Anchors of each feature map, and the places of a range of sizes that stand for all of it.
A_MAP, PLACES = 3, 33


def with_anchors(recipe: Recipe, train: Dataset) -> Recipe:
    """The recipe with anchor sizes in place of ``auto``; any other as it is.

    k-means over the logarithms of the training planes' sizes (the square root of a box's area), as the network sees
    them; the smallest sizes go to the finest feature map. k-means of boxes is that of YOLO9000 (Redmon and Farhadi,
    CVPR 2017), of one dimension here: aspect ratios are settings of their own.

    Raises:
        DataError: fewer sizes of planes than feature maps.
    """
    if not isinstance(recipe, DetectorRecipe | MaskRecipe) or recipe.architecture.anchor_sizes != "auto":
        return recipe
    from sklearn.cluster import KMeans

    maps = len(recipe.architecture.levels) + recipe.architecture.pooled_level
    logs = np.log(training_sizes(recipe, train))
    distinct = len(np.unique(logs.round(3)))
    if distinct < maps:
        raise DataError(
            f"{train.name}/{train.split}: {distinct} sizes of planes for {maps} feature maps; "
            "give architecture.anchor_sizes numbers instead of auto"
        )
    each = min(A_MAP, distinct // maps)
    centres = KMeans(maps * each, n_init=4, random_state=0).fit(logs[:, None]).cluster_centers_.ravel()
    sizes = np.maximum(np.exp(np.sort(centres)).round().astype(int), 4).reshape(maps, each).tolist()
    log.info(f"anchor sizes from {train.planes} planes: {sizes}")
    architecture = recipe.architecture.model_copy(update={"anchor_sizes": sizes})
    return recipe.model_copy(update={"architecture": architecture})


def training_sizes(recipe: DetectorRecipe | MaskRecipe, train: Dataset) -> np.ndarray:
    """Sizes of the training planes in pixels of the network's input, float64 (N,); augmentation at random left out."""
    architecture, sizes = recipe.architecture, []
    for sample in train.samples:
        real = sample.outlined if recipe.task == "maskrcnn" else np.flatnonzero(~sample.crowd)
        sides = sample.boxes[real, 2:].astype(np.float64) - sample.boxes[real, :2]
        if architecture.min_size is not None:
            shown = [recipe.window or (recipe.tiles.size if recipe.tiles else 0)] * 2
            short, long = sorted(shown if shown[0] else (sample.height, sample.width))
            scale = min(architecture.min_size / max(short, 1), architecture.max_size / max(long, 1))
        else:
            scale = architecture.zoom
        scale *= recipe.window_zoom
        for width, height in sides:
            size = np.sqrt(width * height) * scale
            if recipe.window and recipe.plane_sizes:
                targets = np.geomspace(*recipe.plane_sizes, PLACES)
                sizes += [size * plane_scale(max(width, height) * scale, target) for target in targets]
            else:
                sizes.append(size)
    return np.maximum(np.array(sizes), 1.0)
