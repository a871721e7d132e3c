"""TIFF (and JPEG 2000) files through GDAL, by windows or whole: one reading of bands, range, nodata and orientation."""

from __future__ import annotations

import io
import logging
import os
import struct
import uuid
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypedDict, Unpack

import numpy as np
from PIL import TiffImagePlugin

from models.errors import DataError, one_line
from models.images.rendering import (
    DEFAULT,
    Block,
    Bounds,
    Rendering,
    chosen_bands,
    find_bounds,
    oriented,
    oriented_size,
    to_uint8,
    window_in_file,
)

CACHE_MEGABYTES = "256"
# Rows read at a time where the whole file is looked at.
ROWS = 512

# First bytes of classic TIFF and BigTIFF, in either order of bytes.
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG2000_STARTS = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")

_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a TIFF."""
    return start.startswith(TIFF_STARTS)


def is_raster(start: bytes) -> bool:
    """Whether a file that begins with these 12 bytes is read by GDAL, since Pillow would cut it down to 8 bits."""
    return start.startswith((*TIFF_STARTS, *JPEG2000_STARTS))


def tiff_layout(stream: IO[bytes]) -> tuple[int, int, int]:
    """(height, width, orientation) of a TIFF's first image, as they stand in the file; of its header alone.

    Raises:
        ValueError, OSError: not a TIFF that can be read.
    """
    start = stream.read(16)
    if not is_tiff(start):
        raise ValueError("not a TIFF")
    big = b"+" in start[2:4]
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(start if big else start[:8])
        stream.seek(tags.next)
        tags.load(stream)
        return int(tags[_HEIGHT]), int(tags[_WIDTH]), int(tags.get(_ORIENTATION, 1))
    except (KeyError, SyntaxError, TypeError, IndexError, struct.error) as error:
        raise ValueError(f"its header is damaged ({one_line(error)})") from error


def quiet_rasterio() -> Any:
    """Import rasterio with its warnings about odd files off; our own messages report them."""
    # GDAL would keep decoded blocks up to a twentieth of the machine's memory; a row of tiles needs far less.
    os.environ.setdefault("GDAL_CACHEMAX", CACHE_MEGABYTES)
    import rasterio

    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


class Parts(Protocol):
    """The bytes of a file that is elsewhere, see `models.images.remote_bytes`.

    Attributes:
        error: why they cannot be had.
    """

    error: str

    def check(self) -> None:
        """Raise a DataError if it is another file by now."""
        ...

    def stream(self, *, quiet: bool = False) -> IO[bytes]:
        """A stream of them, from the start; a quiet one ends early where it fails, since GDAL's callbacks may not raise."""
        ...


RasterSource = str | Path | bytes | Parts


@contextmanager
def _stream(source: RasterSource) -> Iterator[IO[bytes]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as stream:
            yield stream
    else:
        with source.stream() as stream:
            yield stream


class _Elsewhere:
    """rasterio's dataset of a file that is elsewhere; none of the files beside it are looked for.

    rasterio knows by the context how to open such a file and what is beside it, and fails in any other one; images are
    opened in other threads than they are read in, so that all is done in a context of its own.
    """

    def __init__(self, parts: Parts, driver: str) -> None:
        import rasterio

        # A name of its own: GDAL shares what it knows of files of one name.
        name = f"{uuid.uuid4().hex}.tif"

        def opened(path: str, *_: Any, **__: Any) -> IO[bytes]:
            if Path(path).name != name:
                raise FileNotFoundError(path)
            return parts.stream(quiet=True)

        self._context = copy_context()
        self._dataset = self._context.run(rasterio.open, name, driver=driver, opener=opened)
        weakref.finalize(self, self._context.run, self._dataset.close)

    def __getattr__(self, name: str) -> Any:
        value = self._context.run(getattr, self._dataset, name)
        return partial(self._context.run, value) if callable(value) else value


def _driver(source: RasterSource, name: str) -> str:
    """GDAL's driver for a file; no other format is opened, whatever its header says: some formats lead to further files."""
    with _stream(source) as stream:
        start = stream.read(16)
    if not is_raster(start):
        raise DataError(f"{name}: neither TIFF nor JPEG 2000", "not an image")
    return "GTiff" if is_tiff(start) else "JP2OpenJPEG"


def ground_bounds(path: Path) -> tuple[str, tuple[float, float, float, float]] | None:
    """Name of a file's coordinate system, and its bounds in it: least x and y, largest x and y; None without any."""
    rasterio = quiet_rasterio()
    try:
        with open(path, "rb") as stream:
            if not is_tiff(stream.read(16)):
                return None
        with rasterio.open(os.path.abspath(path), driver="GTiff") as file:
            if file.crs is None or file.transform.is_identity:
                return None
            t, corners = file.transform, ((0, 0), (file.width, 0), (0, file.height), (file.width, file.height))
            xs, ys = ([m[0] * x + m[1] * y + m[2] for x, y in corners] for m in ((t.a, t.b, t.c), (t.d, t.e, t.f)))
            return file.crs.to_string(), (min(xs), min(ys), max(xs), max(ys))
    except (rasterio.errors.RasterioError, OSError, ValueError):
        # Whoever reads the image says what is wrong with it.
        return None


@contextmanager
def opened_tiff(source: Path | Parts) -> Iterator[tuple[Any, tuple[int, int, int]]]:
    """rasterio's dataset of a TIFF, and (height, width, orientation) as they stand in the file.

    Raises:
        ValueError: not a TIFF, or damaged.
        OSError, DataError: it cannot be read.
    """
    rasterio = quiet_rasterio()
    with _stream(source) as stream:
        layout = tiff_layout(stream)
    try:
        if isinstance(source, Path):
            with rasterio.open(os.path.abspath(source), driver="GTiff") as file:
                yield file, layout
        else:
            yield _Elsewhere(source, "GTiff"), layout
    except rasterio.errors.RasterioError as error:
        raise ValueError(one_line(error)) from error


class _Extent(TypedDict, total=False):
    """The pixels that rasterio is to read: a window ((y1, y2), (x1, x2)), or all of them at the size (height, width)."""

    window: tuple[tuple[int, int], tuple[int, int]]
    out_shape: tuple[int, int]
    resampling: Any


class WindowedImage:
    """A file that looks like an array of RGB uint8 (H, W, 3): ``shape``, and windows as ``image[y1:y2, x1:x2]``.

    Windows are parts of the whole, pixel by pixel: bands, range and missing values are settled once for
    the file. Alpha is dropped; a band is black where it is nodata, not finite, or left out by the file's own
    mask, and none of that counts for the range; the orientation tag is followed.

    Args:
        source: path of the file, its bytes, or a remote file of which the parts are fetched that windows need.
        name: what messages call it.

    Raises:
        DataError: not readable, or of a kind that has no RGB reading.
    """

    def __init__(self, source: RasterSource, rendering: Rendering = DEFAULT, name: str = "") -> None:
        rasterio = quiet_rasterio()
        self.path = name or str(source)
        self._memory = rasterio.MemoryFile(source) if isinstance(source, bytes) else None
        self._parts: Parts | None = None
        try:
            driver = _driver(source, self.path)
            if self._memory:
                self._file = self._memory.open(driver=driver)
            elif isinstance(source, (str, os.PathLike)):
                # GDAL takes some relative names for connections or parts of files; a path from the root is none.
                self._file = rasterio.open(os.path.abspath(source), driver=driver)
            elif not isinstance(source, bytes):
                self._parts = source
                self._file = _Elsewhere(source, driver)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise self._failed("cannot be opened", error) from error
        self.dtype, self.rendering = np.dtype(self._kind()), rendering
        self.orientation = self._orientation(source)
        self.shape = (*oriented_size(self._file.height, self._file.width, self.orientation), 3)
        self._palette: np.ndarray | None = None
        self._bands = self._layout()
        structure = self._file.tags(ns="IMAGE_STRUCTURE")
        self._inverted = structure.get("MINISWHITE") == "YES" and self._palette is None
        self._masked = any(f == [rasterio.enums.MaskFlags.per_dataset] for f in self._file.mask_flag_enums)
        self.bounds = self._find_bounds()

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """RGB uint8 (h, w, 3) of two slices without steps.

        Raises:
            DataError: that part of the file is damaged.
        """
        (y1, y2, _), (x1, x2, _) = (s.indices(extent) for s, extent in zip(key, self.shape[:2], strict=True))
        window = (x1, y1, max(x1, x2), max(y1, y2))
        x1, y1, x2, y2 = window_in_file(window, *self.shape[:2], self.orientation)
        return self._shown(window=((y1, y2), (x1, x2)))

    def check(self) -> None:
        """Look whether a file that is elsewhere is still the one whose windows were read.

        Raises:
            DataError: it is not.
        """
        if self._parts:
            self._parts.check()

    def shrunk(self, height: int, width: int) -> np.ndarray:
        """The whole image at that size, averaged where rasterio has no smaller copy of it."""
        from rasterio.enums import Resampling

        plain = self._palette is None and not self._masked and self._file.nodata is None
        size = oriented_size(height, width, self.orientation)
        return self._shown(out_shape=size, resampling=Resampling.average if plain else Resampling.nearest)

    def _failed(self, what: str, error: Exception) -> DataError:
        """The error of a file that is damaged, or of a part that could not be fetched, which GDAL takes for the same."""
        if self._parts and self._parts.error:
            return DataError(self._parts.error, "unreachable")
        return DataError(f"{self.path}: {what} ({one_line(error, 160)})", "damaged")

    def _kind(self) -> str:
        dtype = self._file.dtypes[0]
        if np.dtype(dtype).kind not in "iuf":
            raise DataError(f"{self.path}: {dtype} values have no RGB reading here; convert the file to real numbers")
        return dtype

    def _orientation(self, source: RasterSource) -> int:
        if self._file.driver != "GTiff":
            return 1
        try:
            with _stream(source) as stream:
                return tiff_layout(stream)[2]
        except (ValueError, OSError):
            return 1

    def _layout(self) -> list[int]:
        """Numbers of the bands that are shown; finds the palette."""
        from rasterio.enums import ColorInterp as Colour

        kinds = list(self._file.colorinterp)
        if kinds[0] == Colour.palette and self.rendering.bands is None:
            table = self._file.colormap(1)
            count = 2 ** (8 * self.dtype.itemsize)
            self._palette = np.array([table.get(i, (0, 0, 0))[:3] for i in range(count)], np.uint8)
            return [1]
        named = [kinds.index(c) + 1 for c in (Colour.red, Colour.green, Colour.blue) if c in kinds]
        default = named if len(named) == 3 else [1, 2, 3] if self._file.count >= 3 else [1]
        return chosen_bands(self.rendering, self._file.count, default, self.path)

    def _find_bounds(self) -> Bounds | None:
        if self._palette is not None:
            return None
        bits = self._file.tags(self._bands[0], ns="IMAGE_STRUCTURE").get("NBITS")
        bits = int(bits) if bits and self.dtype.kind != "f" else None
        if self.dtype == np.uint8 and bits and self.rendering.range == "auto":
            return find_bounds(self.rendering.model_copy(update={"range": "depth"}), self.dtype, bits, (), (0, 0))
        return find_bounds(self.rendering, self.dtype, bits, self._blocks(), (self._file.height, self._file.width))

    def _blocks(self) -> Iterator[Block]:
        """The file from top to bottom, in pieces that divide none of its own blocks."""
        height, width = self._file.height, self._file.width
        own = self._file.block_shapes[0][0]
        rows = max(own, ROWS // own * own)
        for top in range(0, height, rows):
            window = ((top, min(top + rows, height)), (0, width))
            values, missing = self._values(window=window)
            yield Block(values, missing | self._transparent(window), top, 0)

    def _transparent(self, window: tuple[tuple[int, int], tuple[int, int]]) -> np.ndarray:
        from rasterio.enums import ColorInterp as Colour

        alpha = [i for i, kind in enumerate(self._file.colorinterp, start=1) if kind == Colour.alpha]
        return self._read(alpha[0], window=window) == 0 if alpha else np.zeros(1, bool)

    def _read(self, bands: int | list[int], **extent: Unpack[_Extent]) -> np.ndarray:
        import rasterio

        # Several bands come as (bands, h, w), and their size must be given so.
        shape = (
            {"out_shape": (len(bands), *extent["out_shape"])} if "out_shape" in extent and isinstance(bands, list) else {}
        )
        try:
            return self._file.read(bands, **{**extent, **shape})
        except (rasterio.errors.RasterioError, OSError) as error:
            raise self._failed("damaged", error) from error

    def _values(self, **extent: Unpack[_Extent]) -> tuple[np.ndarray, np.ndarray]:
        """Values of the shown bands, (bands, h, w), and which of them are missing, bool of that shape."""
        values = self._read(self._bands, **extent)
        missing = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        nodata = self._file.nodata
        if nodata is not None and not np.isnan(nodata):
            missing |= values == np.array(nodata).astype(np.float64)
        if self._masked:
            missing |= self._file.read_masks(1, **extent) == 0
        return values, missing

    def _shown(self, **extent: Unpack[_Extent]) -> np.ndarray:
        values, missing = self._values(**extent)
        if self._palette is not None:
            image = np.where(missing[0][:, :, None], np.uint8(0), self._palette[values[0]])
        else:
            shown = to_uint8(values, self.bounds)
            shown = 255 - shown if self._inverted else shown
            # A band that is missing is black; where all are, so is the pixel.
            image = np.moveaxis(np.where(missing, np.uint8(0), shown) if missing.any() else shown, 0, -1)
            image = image if len(self._bands) == 3 else np.repeat(image, 3, axis=2)
        return np.ascontiguousarray(oriented(image, self.orientation))
