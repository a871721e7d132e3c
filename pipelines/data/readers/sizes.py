"""Annotations made on another size of their image, or on its pixels before they were turned: carried to the file's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.geometry.rescaling import rescaled_mask
from models.geometry.rle import rle_decode, rle_encode
from models.images.decoding import Header
from models.images.rendering import TURNS, oriented, oriented_size
from models.instances import RLE
from pipelines.data.dataset import Problems
from pipelines.data.readers.annotations import Looked, extent, rle_of

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How annotations of a stated size come to lie on a file's pixels.

    Attributes:
        stated: (height, width) that they were made for.
        size: (height, width) of the file.
        orientation: EXIF's, by which they are turned first; 1: not at all.
        unsure: the file has an orientation tag, and its size does not tell whether they were made before it was turned.
    """

    stated: Size
    size: Size
    orientation: int = 1
    unsure: bool = False

    @property
    def turns(self) -> bool:
        """Whether height and width change places."""
        return self.orientation > 1

    def carried(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """A raw annotation with its box and outline in the file's pixels; malformed values stay as they are."""
        moved = dict(entry)
        if self.stated == self.size and not self.turns:
            return moved
        try:
            moved["bbox"] = self._box(entry["bbox"])
        except (KeyError, TypeError, ValueError):
            pass
        outline = entry.get("segmentation")
        try:
            if isinstance(outline, Mapping):
                moved["segmentation"] = self._mask(outline)
            elif outline:
                nested = not isinstance(outline[0], (int, float))
                moved["segmentation"] = [self._points(polygon) for polygon in (outline if nested else [outline])]
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            pass
        return moved

    def _points(self, polygon: Sequence[float]) -> list[float]:
        if len(polygon) % 2:
            # Whoever reads the outline counts it.
            return list(polygon)
        height, width = oriented_size(*self.stated, self.orientation)
        swap, rows, columns = TURNS[self.orientation]
        points = np.array(polygon, np.float64).reshape(-1, 2)[:, :: -1 if swap else 1]
        x, y = points[:, 0], points[:, 1]
        moved = np.stack([width - x if columns else x, height - y if rows else y], axis=1)
        return (moved * self._scale()[:2]).ravel().tolist()

    def _box(self, box: Sequence[float]) -> list[float]:
        x, y, width, height = (float(v) for v in box)
        if width <= 0 or height <= 0:
            return list(box)
        x1, y1, x2, y2 = self._points([x, y, x + width, y + height])
        return [min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)]

    def _mask(self, rle: Mapping[str, Any]) -> RLE:
        # One of another size was made on the file as it is, or is odd, and stays as it is.
        mask = rle_of(rle, *self.stated)
        if self.turns:
            mask = rle_encode(np.ascontiguousarray(oriented(rle_decode(mask), self.orientation)))
        return rescaled_mask(mask, self._scale(), *self.size)

    def _scale(self) -> np.ndarray:
        """New by old size, (4,): x, y, x, y, once turned."""
        height, width = oriented_size(*self.stated, self.orientation)
        return np.array([self.size[1] / width, self.size[0] / height] * 2)


def fit(stated: Size | None, header: Header) -> Fit | None:
    """How annotations of a stated (height, width), None: that of the file, lie on a file; None where nothing explains it.

    The same size; sizes in proportion, to a pixel of rounding; or either for the pixels as they lie in the file,
    where its orientation tag makes height and width change places. Tags that only mirror do not show in the size.
    """
    size = header.size
    raw = (header.height, header.width)
    if stated is None or stated == size:
        return Fit(size, size, unsure=header.orientation > 1 and (stated is None or raw == size))
    turned = header.orientation if raw != size else 1
    if turned > 1 and stated == raw:
        return Fit(stated, size, turned)
    if _proportional(stated, size):
        return Fit(stated, size)
    return Fit(stated, size, turned) if turned > 1 and _proportional(stated, raw) else None


def fitted(looked: Looked, stated: Size | None, entries: Sequence[Mapping[str, Any]]) -> tuple[Looked, Fit]:
    """How annotations lie on a file that was looked at; where nothing explains their size, it is lost ("other size").

    Args:
        stated: (height, width) of the image they were made on; None where that is not stated, and RLE outlines state it.
        entries: the raw annotations.
    """
    stated = stated or size_of_outlines(entries)
    if looked.header is None:
        guess = stated or extent(entries)
        return looked, Fit(guess, guess)
    reach = extent(entries, stated=False)
    if stated is not None and (reach[0] > stated[0] + 1 or reach[1] > stated[1] + 1):
        # A size that does not hold its own annotations, such as a placeholder of 1 x 1, says nothing.
        stated = None
    raw = (looked.header.height, looked.header.width)
    if stated is None and _holds(raw, reach) and not _holds(looked.header.size, reach):
        # They reach beyond the image as it is looked at, and fit it as it lies in the file.
        stated = raw
    lying = fit(stated, looked.header)
    if lying is not None or stated is None:
        return looked, lying or Fit(looked.header.size, looked.header.size)
    (height, width), (rows, columns) = stated, looked.header.size
    why = f"is {columns}x{rows}, its annotations are of {width}x{height}"
    return Looked(looked.header, looked.lost or "other size", looked.why or why), Fit(stated, stated)


def note_fit(lying: Fit, where: str, problems: Problems) -> None:
    """Count an image whose annotations had to be carried to its file's pixels."""
    stated = f"{where}: {lying.stated[1]}x{lying.stated[0]}, the file {lying.size[1]}x{lying.size[0]}"
    if lying.turns:
        problems.add("images turned by their orientation tag, and their annotations with them", stated)
    elif lying.stated != lying.size:
        problems.add("image sizes corrected from the file, annotations scaled", stated)
    elif lying.unsure:
        problems.add("images with an orientation tag, taken as annotated the way they are looked at", where)


def _holds(size: Size, reach: Size) -> bool:
    return reach[0] <= size[0] + 1 and reach[1] <= size[1] + 1


def _proportional(a: Size, b: Size) -> bool:
    """Whether one size is the other times a factor, each side of the smaller one rounded up or down by a pixel."""
    small, large = sorted([a, b])
    lows, highs = (np.array(large) / (np.array(small) + one) for one in (1, -1 + 1e-9))
    return bool(max(lows) <= min(highs))


def size_of_outlines(entries: Sequence[Mapping[str, Any]]) -> Size | None:
    """(height, width) that all RLE outlines of an image state; None where they state none, or several."""
    sizes = set()
    for entry in entries:
        outline = entry.get("segmentation")
        try:
            if isinstance(outline, Mapping):
                height, width = (int(v) for v in outline["size"])
                sizes.add((height, width))
        except (KeyError, TypeError, ValueError):
            continue
    (one,) = sizes if len(sizes) == 1 else (None,)
    return one if one and min(one) > 0 else None
