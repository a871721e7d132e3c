"""How images are cut into tiles."""

from __future__ import annotations

from typing import Annotated, Literal

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.images.windows import AnyImage
from models.tiling.matching import Metric

Window = tuple[int, int, int, int]


class Tiling(BaseModel):
    """How an image is cut into tiles, and how their detections are merged; part of a model version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=512, ge=32, le=8192, description="Side of a tile in pixels.")
    overlap: float = Field(
        default=0.25,
        ge=0,
        le=0.9,
        description="Share of a tile that neighbours share; planes up to that size are whole in some tile.",
    )
    merge: Literal["join", "nms"] = Field(
        default="join", description="join joins the detections of a cut plane, nms keeps the best of those that overlap."
    )
    match: Metric = Field(
        default="iou",
        description="iou, or ios: intersection over the smaller area; measured inside the region that both tiles show.",
    )
    threshold: float = Field(
        default=0.5, gt=0, le=1, description="Least match at which detections of two tiles are of one plane."
    )
    full_image_size: int | None = Field(
        default=None,
        ge=32,
        le=8192,
        description=(
            "Longer side in pixels to which the whole image is shrunk for one more pass, for planes larger than the "
            "overlap; null: no such pass."
        ),
    )
    zooms: tuple[Annotated[float, Field(ge=0.05, le=4)], ...] = Field(
        default=(1.0,),
        min_length=1,
        max_length=6,
        description=(
            "Scales at which an image is looked at, each in tiles of the same size: 0.5 sees planes twice as large as fit "
            "into a tile, 2 sees small ones enlarged."
        ),
    )
    zoom_weights: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        default=None,
        description=(
            "Factor on the scores of each scale of zooms: a fine scale that takes cars for planes gets less, so that it "
            "adds what the others do not see and outvotes none of them. null: 1 for all."
        ),
    )
    turns: Literal[1, 2, 4, 8] = Field(
        default=1,
        description=(
            "Looks at each image, whose boxes and scores are averaged (test-time augmentation): 2 turns it upside down "
            "too, 4 by all quarter turns, 8 mirrors it as well. Takes as many times as long."
        ),
    )
    batch: int | None = Field(
        default=None, ge=1, le=1024, description="Tiles per forward pass; null: 1 on a CPU, 16 on a GPU."
    )

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> Tiling:
        if self.zoom_weights is not None and len(self.zoom_weights) != len(self.zooms):
            raise ValueError(f"zoom_weights: {len(self.zoom_weights)} for {len(self.zooms)} zooms")
        if len(set(self.zooms)) < len(self.zooms):
            raise ValueError("zooms: one is named twice")
        return self

    @property
    def scales(self) -> list[tuple[float, float]]:
        """Each zoom with the factor on its scores."""
        return list(zip(self.zooms, self.zoom_weights or (1.0,) * len(self.zooms), strict=True))

    @property
    def shared(self) -> int:
        """Pixels that neighbouring tiles share."""
        return round(self.size * self.overlap)

    def at(self, zoom: float) -> Tiling:
        """The tiling of the image as it is whose tiles, scaled by ``zoom``, are of this one's size."""
        return self if zoom == 1 else self.model_copy(update={"size": max(1, round(self.size / zoom))})


def tile_grid(height: int, width: int, tiling: Tiling) -> list[Window]:
    """Windows (x1, y1, x2, y2) of the tiles, row by row; all of full size, the last ones reach beyond the image.

    Their places do not depend on the image's size, so that padding an image changes nothing.

    >>> tile_grid(100, 150, Tiling(size=100, overlap=0.2))
    [(0, 0, 100, 100), (80, 0, 180, 100)]
    """
    size, stride = tiling.size, tiling.size - tiling.shared
    tops, lefts = (
        range(0, max(1, -(-(extent - size) // stride) + 1) * stride if extent > size else 1, stride)
        for extent in (height, width)
    )
    return [(x, y, x + size, y + size) for y in tops for x in lefts]


def cut_tile(image: AnyImage, window: Window) -> np.ndarray:
    """The pixels of a window, RGB uint8, black beyond the image."""
    x1, y1, x2, y2 = window
    height, width = image.shape[:2]
    visible = np.asarray(image[y1 : min(y2, height), x1 : min(x2, width)])
    if visible.shape[:2] == (y2 - y1, x2 - x1):
        return visible
    tile = np.zeros((y2 - y1, x2 - x1, 3), np.uint8)
    tile[: visible.shape[0], : visible.shape[1]] = visible
    return tile


def scaled_tile(tile: np.ndarray, size: int) -> np.ndarray:
    """A tile brought to ``size`` pixels a side, RGB uint8: averaged where it shrinks, interpolated where it grows."""
    if tile.shape[0] == size:
        return tile
    kind = cv2.INTER_AREA if size < tile.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(tile, (size, size), interpolation=kind)
