"""Prediction tile by tile: any predictor on images of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from models.geometry.rescaling import rescaled, weighted
from models.images.raster import WindowedImage
from models.images.windows import AnyImage, TurnedImage, shrunk
from models.instances import Instances
from models.predictor import Predictor
from models.runtime.out_of_memory import predict_in_halves
from models.runtime.timing import timed
from models.tiling.merging import TileResult, merge_tiles
from models.tiling.settings import Tiling, Window, cut_tile, scaled_tile, tile_grid
from models.tiling.turns import Turned

# Tiles per forward pass. On a CPU a batch is no gain in itself (15 tiles of 512 pixels,
# torchvision's MobileNet Faster R-CNN: 7.8 s one by one, 11.5 s in batches of 4).
CPU_BATCH, GPU_BATCH = 1, 16
# Tiles for each thread of a predictor that works on several at a time: the last ones of a batch leave threads idle.
TILES_A_THREAD = 8


class Tiled:
    """Predictor that calls another one tile by tile."""

    def __init__(self, predictor: Predictor, tiling: Tiling, device: str = "cpu") -> None:
        self.predictor, self.tiling = predictor, tiling
        concurrent = getattr(predictor, "concurrent", 1)
        on_cpu = CPU_BATCH if concurrent == 1 else TILES_A_THREAD * concurrent
        self.batch = tiling.batch or (on_cpu if device == "cpu" else GPU_BATCH)

    def predict(self, images: Sequence[AnyImage]) -> list[Instances]:
        """Planes in images of any sizes, arrays or `WindowedImage`; see `Predictor`."""
        tile_results = self.predict_tiles(images)
        for image in images:
            if isinstance(image, (WindowedImage, TurnedImage)):
                image.check()
        return [self._merged(str(i), image, tile_results[i]) for i, image in enumerate(images)]

    def predict_tiles(self, images: Sequence[AnyImage]) -> list[list[TileResult]]:
        """Predict the tiles of each image, row by row; the results are not merged.

        Tiles of several images share the forward passes; a tile that shows nothing but one
        colour beyond its neighbours is skipped.
        """
        tile_results: list[list[TileResult]] = [[] for _ in images]
        with ThreadPoolExecutor(max_workers=1) as pool:
            # The next tiles are cut, and read from disk where they must be, while the model works.
            batches = self._batches(images)
            following = timed("tile")(next)
            pending = pool.submit(following, batches, None)
            while (batch := pending.result()) is not None:
                pending = pool.submit(following, batches, None)
                predictions = predict_in_halves(self.predictor, [tile for _, _, tile, _ in batch])
                for (number, window, _, weight), instances in zip(batch, predictions, strict=True):
                    side = window[2] - window[0]
                    result = weighted(rescaled(instances, side, side), weight)
                    tile_results[number].append(TileResult(result, window))
        return tile_results

    def _batches(self, images: Sequence[AnyImage]) -> Iterator[list[tuple[int, Window, np.ndarray, float]]]:
        batch = []
        for number, image in enumerate(images):
            for window, tile, weight in self._tiles(image):
                batch.append((number, window, tile, weight))
                if len(batch) == self.batch:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _tiles(self, image: AnyImage) -> Iterator[tuple[Window, np.ndarray, float]]:
        """The tiles that show something at each zoom: window in the image, pixels of the tile, factor of scores."""
        for zoom, weight in self.tiling.scales:
            grid = self.tiling.at(zoom)
            for window in tile_grid(image.shape[0], image.shape[1], grid):
                tile = cut_tile(image, window)
                if not _shows_nothing_new(tile, window, grid.shared):
                    yield window, scaled_tile(tile, self.tiling.size), weight

    def _merged(self, image_id: str, image: AnyImage, tile_results: list[TileResult]) -> Instances:
        height, width = image.shape[:2]
        whole = None
        if self.tiling.full_image_size and max(height, width) > self.tiling.size:
            small = shrunk(image, self.tiling.full_image_size)
            instances = rescaled(self.predictor.predict([small])[0], height, width)
            sides = (instances.boxes[:, 2:] - instances.boxes[:, :2]).max(axis=1, initial=0)
            # Planes that fit into a tile are detected better there.
            whole = instances.take(np.flatnonzero(sides > self.tiling.shared))
        with timed("merge"):
            return merge_tiles(image_id, height, width, tile_results, tiling=self.tiling, whole=whole)


def tiling_of(predictor: object) -> Tiling | None:
    """The tiling of a predictor, or of the detector of a composition; None where it predicts whole images."""
    if isinstance(predictor, Turned):
        predictor = predictor.predictor
    if isinstance(predictor, Tiled):
        return predictor.tiling
    inner = getattr(predictor, "detector", None)
    return None if inner is None else tiling_of(inner)


def by_tiles(predictor: Predictor, tiling: Tiling | None, device: str) -> Predictor:
    """The predictor wrapped to work by tiles, and on turned images where the tiling says so; itself without a tiling."""
    if tiling is None:
        return predictor
    tiled = Tiled(predictor, tiling, device)
    return tiled if tiling.turns == 1 else Turned(tiled, tiling.turns)


def network_of(predictor: Predictor) -> Predictor:
    """What `by_tiles` wrapped."""
    while isinstance(predictor, (Turned, Tiled)):
        predictor = predictor.predictor
    return predictor


def _shows_nothing_new(tile: np.ndarray, window: Window, shared: int) -> bool:
    """Whether a tile's pixels beyond its left or its upper neighbour are of one colour, as missing imagery is."""
    left, top = window[:2]
    return bool(_one_colour(tile) or (left and _one_colour(tile[:, shared:])) or (top and _one_colour(tile[shared:])))


def _one_colour(tile: np.ndarray) -> bool:
    first = tile[0, 0]
    return bool((tile[::37, ::37] == first).all() and (tile == first).all())
