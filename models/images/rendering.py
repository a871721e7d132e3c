"""From a file's own values (8 to 64 bits, whole or floating, any bands) to RGB uint8: range, bands, orientation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from models.errors import DataError, RecipeError

# Shares of an image's values that are allowed to saturate at either end of a percentile range.
LOW_SHARE, HIGH_SHARE = 0.005, 0.995
# Pixels looked at to find the range of an image, evenly spread over it.
MOST_PIXELS = 2_000_000

# EXIF orientation -> (swap rows and columns, then reverse the rows, then reverse the columns).
TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

Bounds = tuple[float, float]
Window = tuple[int, int, int, int]


class Rendering(BaseModel):
    """How the values of an image file become RGB uint8; part of a model version and of a scoring job.

    Each field has its description. Two renderings of one file differ in every pixel, so a
    version is trained, evaluated and scored with one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    range: Literal["auto", "percentile", "depth"] | Bounds = Field(
        default="auto",
        description=(
            "Values that become 0 and 255. auto: 8-bit values as they are, all others by percentile; percentile: the "
            "0.5th and 99.5th percentile of the whole image, all bands together; depth: the range of the file's type or "
            "stated bits (0 to 1 for floating values); LOW,HIGH: these two, the same for every image."
        ),
    )
    bands: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] | None = Field(
        default=None,
        description="Bands for red, green and blue, counted from 1; one band is shown gray. None: those that the file "
        "names red, green and blue, else the first three, else the first.",
    )

    @field_validator("range")
    @classmethod
    def _ascending(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not (np.isfinite(value).all() and value[0] < value[1]):
            raise ValueError("expected two finite numbers, the lower one first")
        return value

    @field_validator("bands")
    @classmethod
    def _one_or_three(cls, value: Any) -> Any:
        if value is not None and len(value) not in (1, 3):
            raise ValueError("expected one band or three")
        return value


DEFAULT = Rendering()


def parse_rendering(value_range: str | None, bands: str | None, base: Rendering = DEFAULT) -> Rendering:
    """``base`` with the command line's ``--range`` (auto, percentile, depth or ``LOW,HIGH``) and ``--bands`` (``4,3,2``).

    >>> parse_rendering("0,2047", "4,3,2")
    Rendering(range=(0.0, 2047.0), bands=(4, 3, 2))

    Raises:
        RecipeError: neither a word nor numbers as expected.
    """
    content = base.model_dump()
    if value_range is not None:
        content["range"] = value_range.split(",") if "," in value_range else value_range
    if bands is not None:
        content["bands"] = None if bands == "auto" else bands.split(",")
    try:
        return TypeAdapter(Rendering).validate_python(content)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        given, expected = {
            "range": (value_range, "auto, percentile, depth or LOW,HIGH such as 0,2047"),
            "bands": (bands, "auto, one band or three such as 4,3,2"),
        }[field]
        raise RecipeError(f"--{field} {given}: expected {expected}") from error


def chosen_bands(settings: Rendering, count: int, default: list[int], name: str) -> list[int]:
    """Numbers, from 1, of the bands to show.

    Raises:
        DataError: the file has fewer bands.
    """
    if settings.bands is None:
        return default
    if max(settings.bands) > count:
        raise DataError(f"{name}: has {count} bands, --bands asks for band {max(settings.bands)}", "bands")
    return list(settings.bands)


def depth_bounds(dtype: np.dtype, bits: int | None = None) -> Bounds:
    """The range of a type, or of its ``bits`` where the file states them; 0 to 1 for floating values.

    >>> depth_bounds(np.dtype("uint16"), 11), depth_bounds(np.dtype("int16")), depth_bounds(np.dtype("float32"))
    ((0.0, 2047.0), (0.0, 32767.0), (0.0, 1.0))
    """
    if dtype.kind == "f":
        return 0.0, 1.0
    return 0.0, float(2**bits - 1 if bits else np.iinfo(dtype).max)


class Block(NamedTuple):
    """A piece of an image: values (bands, h, w), which say nothing, bool of that shape, and its place in the file."""

    values: np.ndarray
    ignored: np.ndarray
    top: int
    left: int


def find_bounds(
    settings: Rendering, dtype: np.dtype, bits: int | None, blocks: Iterable[Block], shape: tuple[int, int]
) -> Bounds | None:
    """The values that become 0 and 255; None where 8-bit values stay as they are.

    Args:
        blocks: the whole image in pieces; only iterated where percentiles are needed.
        shape: (height, width) of the image in the file.
    """
    if isinstance(settings.range, tuple):
        return settings.range
    depth = depth_bounds(dtype, bits)
    if settings.range == "depth" or (settings.range == "auto" and dtype == np.uint8):
        return None if depth == (0.0, 255.0) else depth
    bounds = _percentiles(dtype, blocks, shape)
    # An image of one value has no range of its own.
    return depth if bounds is None or bounds[0] == bounds[1] else bounds


def _percentiles(dtype: np.dtype, blocks: Iterable[Block], shape: tuple[int, int]) -> Bounds | None:
    # Every step-th row and column of the image, wherever the blocks begin: reading it otherwise changes nothing.
    step = max(1, int(np.ceil(np.sqrt(shape[0] * shape[1] / MOST_PIXELS))))
    small = dtype.kind in "iu" and dtype.itemsize <= 2
    low = int(np.iinfo(dtype).min) if small else 0
    counts = np.zeros(2 ** (8 * dtype.itemsize) if small else 0, np.int64)
    sampled = []
    for block in blocks:
        rows, columns = slice(-block.top % step, None, step), slice(-block.left % step, None, step)
        values = block.values[:, rows, columns][~block.ignored[:, rows, columns]]
        if small:
            counts += np.bincount(values.astype(np.int64) - low, minlength=len(counts))
        else:
            sampled.append(values[np.isfinite(values)].astype(np.float64))
    if small:
        return _of_histogram(counts, low)
    chosen = np.sort(np.concatenate(sampled)) if sampled else np.zeros(0)
    if not len(chosen):
        return None
    places = [int(share * (len(chosen) - 1)) for share in (LOW_SHARE, HIGH_SHARE)]
    bounds = float(chosen[places[0]]), float(chosen[places[1]])
    return bounds if bounds[0] < bounds[1] else (float(chosen[0]), float(chosen[-1]))


def _of_histogram(counts: np.ndarray, low: int) -> Bounds | None:
    total = int(counts.sum())
    if not total:
        return None
    reached = np.cumsum(counts)
    first, last = (int(np.searchsorted(reached, share * total, side="right")) for share in (LOW_SHARE, HIGH_SHARE))
    if first == last:
        # Ground of one value with a few planes on it: their values are the range.
        filled = np.flatnonzero(counts)
        first, last = int(filled[0]), int(filled[-1])
    return float(first + low), float(last + low)


def to_uint8(values: np.ndarray, bounds: Bounds | None) -> np.ndarray:
    """Values of any type, (bands, h, w) or (h, w), to uint8: ``bounds`` become 0 and 255, values that are not finite 0."""
    if bounds is None:
        return values.astype(np.uint8, copy=False)
    low, high = bounds
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        # A table of all values is exact, and faster than arithmetic on each pixel.
        codes = np.dtype(f"u{values.dtype.itemsize}")
        table = _scaled(np.arange(2 ** (8 * codes.itemsize)).astype(codes).view(values.dtype).astype(np.float64), low, high)
        return table[values.view(codes)]
    return _scaled(values.astype(np.float64), low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    values = np.where(np.isfinite(values), values, low)
    return ((values - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W, ...) as its EXIF or TIFF orientation, 1 to 8, says that it is looked at."""
    swap, rows, columns = TURNS.get(orientation, TURNS[1])
    if swap:
        image = image.swapaxes(0, 1)
    return image[:: -1 if rows else 1, :: -1 if columns else 1]


def oriented_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """(height, width) of an image once it is `oriented`."""
    return (width, height) if TURNS.get(orientation, TURNS[1])[0] else (height, width)


def window_in_file(window: Window, height: int, width: int, orientation: int) -> Window:
    """Where a window (x1, y1, x2, y2) of the `oriented` image, (height, width), lies in the file."""
    x1, y1, x2, y2 = window
    swap, rows, columns = TURNS.get(orientation, TURNS[1])
    if rows:
        y1, y2 = height - y2, height - y1
    if columns:
        x1, x2 = width - x2, width - x1
    return (y1, x1, y2, x2) if swap else (x1, y1, x2, y2)


def map_to_file(height: int, width: int, orientation: int) -> tuple[float, float, float, float, float, float]:
    """The affine map (a, b, c, d, e, f) from pixels of the `oriented` image, (height, width), to those of the file.

    >>> map_to_file(40, 30, 6)  # x, y -> y, 30 - x
    (0.0, 1.0, 0.0, -1.0, 0.0, 30.0)
    """
    swap, rows, columns = TURNS.get(orientation, TURNS[1])
    across = (-1.0, 0.0, float(width)) if columns else (1.0, 0.0, 0.0)
    down = (0.0, -1.0, float(height)) if rows else (0.0, 1.0, 0.0)
    return (*down, *across) if swap else (*across, *down)
