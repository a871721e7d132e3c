"""Images that are read window by window: arrays in memory, and files too large for it, through rasterio."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from models.errors import DataError, one_line
from models.image import MAX_PIXELS, Source, image_size, read_image

# Above this many pixels a TIFF is not decoded as a whole.
WINDOWED_PIXELS = 100_000_000
CACHE_MEGABYTES = "256"
WINDOWED_SUFFIXES = (".tif", ".tiff")


class WindowedImage:
    """A file that looks like an array of RGB uint8 (H, W, 3): ``shape``, and windows as ``image[y1:y2, x1:x2]``.

    The same pixels as `models.image.read_image` gives: gray becomes RGB, alpha is dropped,
    16-bit values above 255 anywhere mean the full 16-bit range.

    Raises:
        DataError: not readable, or of a kind that has no RGB reading.
    """

    def __init__(self, path: str | Path) -> None:
        rasterio = quiet_rasterio(path)
        self.path = Path(path)
        try:
            self._file = rasterio.open(path)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise DataError(f"{path}: cannot be opened ({one_line(error)[:160]})", "damaged") from None
        self.shape = (self._file.height, self._file.width, 3)
        self._bands, self._palette = self._layout()
        self._scale = self._range() if self._file.dtypes[0] == "uint16" else 1.0

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """RGB uint8 (h, w, 3) of two slices without steps.

        Raises:
            DataError: that part of the file is damaged.
        """
        (y1, y2, _), (x1, x2, _) = (s.indices(extent) for s, extent in zip(key, self.shape[:2], strict=True))
        return self._read(window=((y1, max(y1, y2)), (x1, max(x1, x2))))

    def shrunk(self, height: int, width: int) -> np.ndarray:
        """The whole image at that size, averaged where rasterio has no smaller copy of it."""
        from rasterio.enums import Resampling

        how = Resampling.average if self._palette is None else Resampling.nearest
        return self._read(out_shape=(len(self._bands), height, width), resampling=how)

    def _read(self, **how: Any) -> np.ndarray:
        import rasterio

        try:
            values = self._file.read(self._bands, **how)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise DataError(f"{self.path}: damaged ({one_line(error)[:160]})", "damaged") from None
        if self._palette is not None:
            return self._palette[values[0]]
        if self._scale != 1.0:
            values = (values * self._scale).round()
        image = np.moveaxis(values, 0, -1).astype(np.uint8)
        return np.ascontiguousarray(image if len(self._bands) == 3 else np.repeat(image, 3, axis=2))

    def _layout(self) -> tuple[list[int], np.ndarray | None]:
        from rasterio.enums import ColorInterp as Colour

        kinds, dtype = list(self._file.colorinterp), self._file.dtypes[0]
        if dtype not in ("uint8", "uint16") or Colour.cyan in kinds:
            what = "CMYK" if Colour.cyan in kinds else dtype
            raise DataError(f"{self.path}: {what} values have no RGB reading here; convert the file to 8-bit RGB")
        if kinds[0] == Colour.palette:
            table = self._file.colormap(1)
            return [1], np.array(
                [table.get(i, (0, 0, 0))[:3] for i in range(65_536 if dtype == "uint16" else 256)], np.uint8
            )
        if {Colour.red, Colour.green, Colour.blue} <= set(kinds):
            return [kinds.index(c) + 1 for c in (Colour.red, Colour.green, Colour.blue)], None
        return ([1, 2, 3] if self._file.count >= 3 else [1]), None

    def _range(self) -> float:
        for _, window in self._file.block_windows(1):
            if (self._file.read(self._bands, window=window) > 255).any():
                return 255 / 65535
        return 1.0


AnyImage = np.ndarray | WindowedImage


def quiet_rasterio(path: str | Path) -> Any:
    """The module rasterio, with what it says about odd files left to our own messages.

    Raises:
        DataError: it is not installed; ``path`` is what it is needed for.
    """
    # GDAL would keep decoded blocks up to a twentieth of the machine's memory; a row of tiles needs far less.
    os.environ.setdefault("GDAL_CACHEMAX", CACHE_MEGABYTES)
    try:
        import rasterio
    except ImportError:
        raise DataError(
            f"{path}: too large to be decoded whole; pip install rasterio (the extra 'geo')", "too large"
        ) from None
    logging.getLogger("rasterio").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def open_image(path: Source) -> AnyImage:
    """An image whole, or as a `WindowedImage` where it is a large TIFF on this machine.

    Raises:
        DataError: not readable, or too large to be decoded whole and no TIFF.
    """
    if isinstance(path, (str, os.PathLike)) and Path(path).suffix.lower() in WINDOWED_SUFFIXES:
        height, width = image_size(path)
        if height * width > MAX_PIXELS or (height * width > WINDOWED_PIXELS and _has_rasterio()):
            return WindowedImage(Path(path))
    return read_image(path)


def _has_rasterio() -> bool:
    from importlib.util import find_spec

    return find_spec("rasterio") is not None


def shrunk(image: AnyImage, longest: int) -> np.ndarray:
    """The whole image with its longer side at most ``longest`` pixels, averaged, RGB uint8."""
    height, width = image.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if isinstance(image, WindowedImage):
        return image.shrunk(*size)
    return image if size == (height, width) else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
