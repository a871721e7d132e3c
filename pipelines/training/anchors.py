"""Anchor sizes from the data: ``anchor_sizes: auto`` of a recipe becomes numbers before it is trained."""

from __future__ import annotations

import logging

import numpy as np

from models.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.data.loading.augment import move_boxes, place_window
from pipelines.recipes.settings import DetectorRecipe, MaskRecipe, Recipe

log = logging.getLogger(__name__)

# Anchors of each feature map, and random windows that are drawn to see sizes.
A_MAP, DRAWN = 3, 2000


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
    """Sizes of planes in pixels of the network's input, float64 (N,).

    Of random windows those in `DRAWN` of them, cut planes as they are cut; else of all planes of the images, or of the
    tiles that they are whole in, without augmentation.
    """
    architecture, sizes = recipe.architecture, []
    for i in range(DRAWN) if recipe.window else range(len(train)):
        sample = train.samples[i % len(train)]
        real = sample.outlined if recipe.task == "maskrcnn" else np.flatnonzero(~sample.crowd)
        boxes, extent = sample.boxes[real].astype(np.float64), (sample.height, sample.width)
        if recipe.window:
            affine = place_window(
                np.random.default_rng([recipe.seed, 4, i]),
                extent,
                boxes,
                settings=recipe.augmentation,
                size=recipe.window,
                focus=recipe.focus,
                zoom=recipe.window_zoom * (architecture.zoom if architecture.min_size is None else 1.0),
                plane_sizes=recipe.plane_sizes,
            )
            boxes, extent = move_boxes(boxes, affine, recipe.window, recipe.min_visible)[0], (recipe.window,) * 2
        elif recipe.tiles:
            extent = (recipe.tiles.size,) * 2
        sizes += list(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) * _network_scale(recipe, *extent))
    return np.maximum(np.array(sizes), 1.0)


def _network_scale(recipe: DetectorRecipe | MaskRecipe, height: int, width: int) -> float:
    """The factor by which the network scales an image of that size."""
    architecture = recipe.architecture
    if architecture.min_size is None:
        # Windows are cut at that scale already.
        return 1.0 if recipe.window else architecture.zoom
    return min(architecture.min_size / min(height, width), architecture.max_size / max(height, width))
