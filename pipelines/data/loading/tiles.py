"""Images cut into tiles to train on: on the fly, or once into a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from models.errors import DataError, one_line
from models.geometry.boxes import box_area, clip_boxes
from models.geometry.rle import CropMask, rle_area, rle_boxes, rle_crop, rle_paste
from models.images.rendering import DEFAULT
from models.instances import RLE
from models.tiling.settings import Tiling, Window, tile_grid
from pipelines.data.dataset import Dataset, Problems, Sample
from pipelines.data.loading.unreadable import Unreadable, raise_passing
from pipelines.files import clear_temporaries, quoted_name, write_whole
from pipelines.locking import held, lock_of
from pipelines.progress import Progress

DONE = "tiles.json"
# Raised whenever equal settings give tiles of other pixels or names, as with another decoder.
FORMAT = 2


class TileSettings(BaseModel):
    """Tiles that training images are cut into."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=512, ge=32, le=8192, description="Side of a tile in pixels.")
    overlap: float = Field(default=0.25, ge=0, le=0.9, description="Share of a tile that neighbours share.")
    empty: float = Field(default=0.1, ge=0, le=1, description="Share of the tiles without planes that is kept.")
    cached: bool = Field(
        default=False, description="Write the tiles to a folder first, instead of cutting them in each epoch."
    )

    def grid(self, height: int, width: int) -> list[Window]:
        """Windows of the tiles of an image, the same as in prediction."""
        return tile_grid(height, width, Tiling(size=self.size, overlap=self.overlap))


def cut_tiles(dataset: Dataset, settings: TileSettings, min_visible: float, seed: int = 0) -> Dataset:
    """The tiles of all images as samples; their planes are clipped to them.

    A plane counts where at least ``min_visible`` of its mask (of its box, where it has no
    mask) is inside. Tiles that show less of one without showing another are left out: they
    are neither empty nor annotated. Which empty tiles are kept depends on ``seed`` and names.

    Raises:
        DataError: no tile with a plane is left.
    """
    problems = Problems()
    tiles: list[Sample] = []
    for sample in dataset.samples:
        crops: dict[int, CropMask] = {}
        for window in settings.grid(sample.height, sample.width):
            tile, whole = _tile(sample, window, min_visible, crops)
            if (~tile.crowd).any():
                tiles.append(tile)
            elif not whole:
                problems.add("tiles with slivers of planes alone left out", tile.image_id)
            elif _draw(seed, tile.image_id) < settings.empty:
                tiles.append(tile)
    cut = replace(dataset, samples=tuple(tiles), problems=problems)
    if not cut.planes:
        raise DataError(f"{dataset.name}: no tile of {settings.size} pixels shows {min_visible:g} of a plane")
    return cut


def _draw(seed: int, name: str) -> float:
    return int(hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()[:8], 16) / 16**8


def _tile(sample: Sample, window: Window, min_visible: float, crops: dict[int, CropMask]) -> tuple[Sample, bool]:
    """The tile, and whether all planes that reach into it count."""
    x1, y1, _, y2 = window
    size = y2 - y1
    moved = sample.boxes - np.array([x1, y1, x1, y1], np.float32)
    clipped = clip_boxes(moved, size, size)
    inside = np.flatnonzero((clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1]))
    boxes, masks, crowd = [], [], []
    whole = True
    for i in inside.tolist():
        mask, box = sample.masks[i], clipped[i]
        visible = float(box_area(box)[0] / max(box_area(moved[i])[0], 1e-9))
        if mask is not None:
            if i not in crops:
                crops[i] = rle_crop(mask)
            mask = clip_mask(crops[i], window)
            area = float(rle_area([mask])[0])
            visible = area / max(int(crops[i].mask.sum()), 1)
            # A cut plane's box is drawn anew: that of the whole plane may be wider than what is seen of it.
            box = rle_boxes([mask])[0] if 0 < visible < 1 else box
        if visible <= 0 or (visible < min_visible and not sample.crowd[i]):
            whole = whole and visible <= 0
            continue
        boxes.append(box)
        masks.append(mask)
        crowd.append(bool(sample.crowd[i]))
    return replace(
        sample,
        image_id=f"{sample.image_id}_{x1}_{y1}",
        height=size,
        width=size,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        masks=tuple(masks),
        crowd=np.array(crowd, bool),
        number=None,
        window=window,
    ), whole


def clip_mask(crop: CropMask, window: Window) -> RLE:
    """Clip a mask to a window, as RLE of the window's size, pixel by pixel the same.

    Args:
        crop: the mask in its own part of the image (`rle_crop`).
        window: (x1, y1, x2, y2), which may reach beyond the image.
    """
    mask, left, top = crop
    x1, y1, x2, y2 = window
    begin_x, begin_y = max(x1 - left, 0), max(y1 - top, 0)
    seen = mask[begin_y : max(y2 - top, begin_y), begin_x : max(x2 - left, begin_x)]
    if not seen.size:
        return rle_paste(seen[:0, :0], 0, 0, y2 - y1, x2 - x1)
    return rle_paste(seen, max(left - x1, 0), max(top - y1, 0), y2 - y1, x2 - x1)


def cache_folder(work: Path, tiles: TileSettings, min_visible: float, seed: int, digest: str) -> Path:
    """The folder of cached tiles, named by all that decides their pixels and names."""
    cut = f"{FORMAT}{tiles.model_dump_json()}{min_visible}{seed}{digest}"
    return work / f"tiles-{hashlib.sha256(cut.encode()).hexdigest()[:12]}"


def cached_tiles(tiles: Dataset, folder: Path, progress: Progress, unreadable: Unreadable | None = None) -> Dataset:
    """The tiles as PNG files of ``folder``; those that an earlier call has written whole are kept.

    One process at a time cuts; others wait for it. ``tiles.json`` says how many bytes each
    tile has: one that is missing or cut short is made again.

    Tiles of an image that cannot be read have no file and stay as they were, noted as ``unreadable``.

    Raises:
        DataError: a folder that cannot be written.
        OutputError: the folder's lock cannot be written.
    """
    unreadable = unreadable or Unreadable()
    # Quoted, so that the names of "a/b" and "a_b" differ.
    files = {t.image_id: folder / f"{quoted_name(t.image_id)}.png" for t in tiles.samples}
    samples = tuple(replace(t, path=files[t.image_id], window=None, rendering=DEFAULT) for t in tiles.samples)
    with held(lock_of(folder), "cutting tiles", wait=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clear_temporaries(folder)
            known = _known(folder / DONE)
            pairs = zip(tiles.samples, samples, strict=True)
            missing = {t.image_id: files[t.image_id] for t, s in pairs if not _is_whole(s, files[t.image_id], known)}
            if missing:
                _write([t for t in tiles.samples if t.image_id in missing], missing, progress, unreadable)
            sizes = {s.path.name: s.path.stat().st_size for s in samples if s.path.is_file()}
            if sizes != known:
                write_whole(folder / DONE, lambda handle: handle.write(json.dumps(sizes).encode()))
        except OSError as error:
            raise DataError(f"{folder}: tiles cannot be written ({error.strerror or one_line(error)})") from error
    pairs = zip(tiles.samples, samples, strict=True)
    return replace(tiles, samples=tuple(sample if sample.path.is_file() else tile for tile, sample in pairs))


def _known(path: Path) -> dict[str, int]:
    """Bytes of each tile by its name; nothing where that is not known."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_whole(tile: Sample, file: Path, known: Mapping[str, int]) -> bool:
    try:
        if file.name in known:
            return file.stat().st_size == known[file.name]
        # Written by a call that did not come to its end.
        with Image.open(file) as image:
            image.load()
            return image.size == (tile.width, tile.height)
    except (OSError, SyntaxError, ValueError):
        return False


def _write(tiles: Sequence[Sample], targets: Mapping[str, Path], progress: Progress, unreadable: Unreadable) -> None:
    from pipelines.data.loading.cache import ImageCache

    cache = ImageCache()
    for tile in progress(tiles, len(tiles), "cutting tiles"):
        if tile in unreadable:
            continue
        try:
            image = Image.fromarray(cache.read(tile))
        except Exception as error:
            raise_passing(error, tile)
            # A decoder may raise anything on a damaged file.
            unreadable.add(tile, error)
            targets[tile.image_id].unlink(missing_ok=True)
            continue
        write_whole(targets[tile.image_id], partial(image.save, format="PNG", compress_level=1))
