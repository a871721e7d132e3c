"""The one data set type: images with planes, its problems, its digest and its split."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import DataError
from models.geometry.boxes import crop_window, xyxy_to_xywh
from models.geometry.rle import rle_area, rle_paste
from models.images.decoding import image_size
from models.images.rendering import DEFAULT, Rendering
from models.images.windows import AnyImage, open_image
from models.instances import RLE
from models.tiling.settings import Window, cut_tile
from pipelines.data.remote import UNREADABLE, AnyPath, fingerprints

# Names of cut tiles: DOTA's devkit (P0001__1.0__824___0), and x/y offsets at the end
# (scene_512_1024, scene-x512-y1024, scene_tile_3).
SCENE_OF_TILE = re.compile(r"^(?P<scene>.+?)(?:__[\d.]+__\d+___\d+|[_-]x?\d+[_-]y?\d+|[_-]tile[_-]?\d+)$", re.I)


@dataclass(frozen=True)
class Sample:
    """One image and the planes in it.

    Attributes:
        image_id: unique in its data set.
        path: of the file; a ``UPath`` where it is remote (`pipelines.data.remote`).
        height: in pixels; 0 where it is not known before the file is read.
        width: as ``height``.
        scene: images of one scene are never split between training and validation.
        boxes: (N, 4) float32, xyxy pixels.
        masks: for each plane an RLE of the image's size, or None.
        crowd: (N,) bool, whether a box holds several planes.
        truth: False where nothing is known about its planes.
        number: the image's id in the COCO file it comes from, if it comes from one.
        window: (x1, y1, x2, y2) of the file that the image is; None for all of it.
        rendering: how the file's values become RGB.
        lost: why its file could not be used when the annotations were read ("missing", "unreadable", "cut",
            "other size"), empty where it could: such an image keeps its planes, which no model can detect, and a
            size that was stated or that they fit into.
    """

    image_id: str
    path: AnyPath
    height: int
    width: int
    scene: str
    boxes: np.ndarray
    masks: tuple[RLE | None, ...]
    crowd: np.ndarray
    _: KW_ONLY
    truth: bool = True
    number: int | None = None
    window: Window | None = None
    rendering: Rendering = DEFAULT
    lost: str = ""

    @property
    def has_masks(self) -> bool:
        """Whether any plane has an outline."""
        return any(m is not None for m in self.masks)

    @property
    def outlined(self) -> np.ndarray:
        """Indices, int64 (K,), of the planes that have an outline, crowds left out."""
        known = np.array([m is not None for m in self.masks], bool)
        return np.flatnonzero(known & ~self.crowd) if len(known) else np.zeros(0, np.int64)

    def for_masks(self) -> Sample:
        """As masks are judged: a plane without an outline is a crowd in its box, where no mask counts.

        COCO matches no detection to a crowd, and counts none that lies in one.
        """
        without = [i for i, m in enumerate(self.masks) if m is None]
        if not without:
            return self
        masks, crowd = list(self.masks), self.crowd.copy()
        for i in without:
            x1, y1, x2, y2 = crop_window(self.boxes[i], self.height, self.width)
            masks[i], crowd[i] = rle_paste(np.ones((y2 - y1, x2 - x1), bool), x1, y1, self.height, self.width), True
        return replace(self, masks=tuple(masks), crowd=crowd)

    def size(self) -> tuple[int, int]:
        """(height, width), read from the file's header where they are not known yet.

        Raises:
            DataError: not readable.
        """
        return (self.height, self.width) if self.height else image_size(self.path)

    def read(self) -> np.ndarray:
        """Decode the image, RGB uint8 (H, W, 3).

        Raises:
            DataError: not readable, or of another size than its annotation says.
        """
        return np.asarray(self.part_of(open_image(self.path, self.rendering))[:, :])

    def part_of(self, image: AnyImage) -> AnyImage:
        """Its window of the file's image, or the image; large files stay unread where there is no window.

        Raises:
            DataError: the file is of another size than its annotation says.
        """
        if self.window is not None:
            return cut_tile(image, self.window)
        # Without ground truth nothing depends on the size that was noted beforehand.
        if self.truth and tuple(image.shape[:2]) != (self.height, self.width):
            raise DataError(
                f"{self.path}: is {image.shape[1]} x {image.shape[0]} pixels, "
                f"its annotation says {self.width} x {self.height}",
                "other size",
            )
        return image


@dataclass
class Problems:
    """Flaws of the data that a reader left out: kind -> count, and the first example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one problem."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, example)

    def summary(self) -> str:
        """One line, such as ``3 boxes outside their image (first: ...)``; empty without problems."""
        return "; ".join(f"{n} {kind} (first: {self.examples[kind]})" for kind, n in sorted(self.counts.items()))


@dataclass(frozen=True)
class Dataset:
    """Images of one split, in a fixed order; ``category_id`` is the category's number in the source."""

    name: str
    source: AnyPath
    split: str
    category: str
    samples: tuple[Sample, ...]
    _: KW_ONLY
    problems: Problems = field(default_factory=Problems, compare=False)
    category_id: int = 1
    # Not arguments, so that a subset starts with none.
    _fingerprints: list[str] = field(default_factory=list, init=False, compare=False, repr=False)
    _digest: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def planes(self) -> int:
        """Number of annotated planes, crowds left out."""
        return sum(int((~s.crowd).sum()) for s in self.samples)

    @property
    def has_truth(self) -> bool:
        """Whether the planes of every image are known."""
        return len(self.samples) > 0 and all(s.truth for s in self.samples)

    @property
    def has_masks(self) -> bool:
        """Whether any plane has an outline; those that have none are left out where masks are learnt or judged."""
        return any(s.has_masks for s in self.samples)

    @property
    def without_outline(self) -> int:
        """Number of planes, crowds left out, that have no outline."""
        return sum(m is None and not c for s in self.samples for m, c in zip(s.masks, s.crowd, strict=True))

    def for_masks(self) -> Dataset:
        """The same images as masks are judged by, see `Sample.for_masks`; its digest is that of this data set."""
        if not self.has_masks or all(m is not None for s in self.samples for m in s.masks):
            return self
        changed = replace(self, samples=tuple(s.for_masks() for s in self.samples))
        changed._fingerprints.extend(self._fingerprints)
        changed._digest.append(self.digest())
        return changed

    def digest(self) -> str:
        """sha256 of the images and the annotations, 16 hex digits; paths and order do not count.

        Images with ground truth count by their bytes. Of others there may be millions: they
        count by size and time of change, or an object store's mark of the content.
        """
        if not self._digest:
            self._digest.append(self.digest_with(self.file_digests()))
        return self._digest[0]

    def file_digests(self) -> list[str]:
        """Fingerprint of each image file, in the samples' order; "unreadable" where a file has none."""
        if not self._fingerprints:
            self._fingerprints.extend(
                [_file_digest(s.path) for s in self.samples]
                if self.has_truth
                else fingerprints([s.path for s in self.samples])
            )
        return self._fingerprints

    def digest_with(self, file_digests: Sequence[str], as_in_060: bool = False) -> str:
        """As `digest`, with other fingerprints of the files, in the samples' order.

        Args:
            as_in_060: without the images that are missing or cannot be read, whose planes count now.
        """
        # As json.dumps would write it as one list, which for millions of images would fill the memory.
        digest, separator = hashlib.sha256(b"["), b""
        for sample, content in sorted(zip(self.samples, file_digests, strict=True), key=lambda p: p[0].image_id):
            if as_in_060 and sample.lost in ("missing", "unreadable"):
                continue
            digest.update(separator + _described(sample, content))
            separator = b", "
        digest.update(b"]")
        return digest.hexdigest()[:16]

    def sample_digests(self) -> list[str]:
        """sha256 of each image with its annotations, 16 hex digits, in the samples' order."""
        pairs = zip(self.samples, self.file_digests(), strict=True)
        return [hashlib.sha256(_described(*pair)).hexdigest()[:16] for pair in pairs]

    def subset(self, image_ids: Iterable[str], split: str) -> Dataset:
        """The samples with these ids, in the order they have here."""
        wanted = set(image_ids)
        return replace(self, split=split, samples=tuple(s for s in self.samples if s.image_id in wanted))

    @property
    def rendering(self) -> Rendering:
        """How its files are read."""
        return self.samples[0].rendering if self.samples else DEFAULT

    def rendered(self, rendering: Rendering) -> Dataset:
        """The same data set, its files read with this rendering."""
        if all(s.rendering == rendering for s in self.samples):
            return self
        changed = replace(self, samples=tuple(replace(s, rendering=rendering) for s in self.samples))
        # Fingerprints of files do not depend on how they are read.
        changed._fingerprints.extend(self._fingerprints)
        changed._digest.extend(self._digest)
        return changed

    def summary(self) -> str:
        """One line for people: counts, then problems."""
        text = f"{self.name} {self.split}: {len(self)} images, {self.planes} planes"
        if not self.has_truth:
            text = f"{self.name} {self.split}: {len(self)} images, no ground truth"
        elif self.has_masks and self.without_outline:
            text += f" ({self.without_outline} of them without an outline: left out for masks)"
        problems = self.problems.summary()
        return f"{text}; {problems}" if problems else text

    def to_coco(self) -> dict:
        """COCO form with image ids 1..N in sample order and one category, for the evaluators."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, sample in enumerate(self.samples, start=1):
            images.append({"id": number, "file_name": sample.image_id, "height": sample.height, "width": sample.width})
            for box, mask, crowd in zip(xyxy_to_xywh(sample.boxes), sample.masks, sample.crowd, strict=True):
                entry: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
                entry["iscrowd"] = int(crowd)
                # As in COCO, the size classes go by the outline's area where there is one.
                area = float(box[2] * box[3]) if mask is None else float(rle_area([mask])[0])
                entry |= {"bbox": box.tolist(), "area": area}
                if mask is not None:
                    entry["segmentation"] = mask
                annotations.append(entry)
        return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": self.category}]}


def _described(sample: Sample, content: str) -> bytes:
    """An image and its annotations for a digest; ``content``: digest of the file."""
    planes = [
        [*(round(float(v), 2) for v in box), bool(crowd), None if mask is None else mask["counts"]]
        for box, crowd, mask in zip(sample.boxes, sample.crowd, sample.masks, strict=True)
    ]
    return json.dumps([sample.image_id, content, sample.truth, planes]).encode()


def _file_digest(path: AnyPath) -> str:
    if not isinstance(path, Path):
        return fingerprints([path])[0]
    try:
        state = path.stat()
        return _content_digest(path, state.st_mtime_ns, state.st_size)
    except OSError:
        # Whoever reads it says what is wrong with it.
        return UNREADABLE


@lru_cache(maxsize=200_000)
def _content_digest(path: Path, modified: int, size: int) -> str:
    """Of the bytes; size and time of change tell the cache when to look again."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def scene_of(image_id: str, pattern: str | None = None) -> str:
    """The source scene of a tile, by its name; a name that tells nothing is its own scene.

    ``pattern`` is a regular expression whose first group (or whole match) is the scene.

    Raises:
        DataError: it is none.

    >>> scene_of("P0001__1__824___0"), scene_of("harbour_512_0"), scene_of("P0699")
    ('P0001', 'harbour', 'P0699')
    >>> scene_of("P02211", r"^(P\\d{4})")
    'P0221'
    """
    if pattern:
        try:
            match = re.search(pattern, image_id)
        except re.error as error:
            raise DataError(f"scene pattern {pattern!r}: is no regular expression ({error})") from error
        if match:
            return match.group(1) if match.groups() else match.group(0)
        return image_id
    match = SCENE_OF_TILE.match(image_id)
    return match["scene"] if match else image_id


def split_by_scene(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a data set into training and validation; a scene is never divided.

    Scenes are ordered by a hash of (seed, scene), so that the split does not depend
    on file order and adding a scene moves few others. In that order each scene goes to validation
    that brings it nearer to ``fraction`` of the images; where none does, the smallest one goes. At least
    one scene stays in training.

    Raises:
        DataError: a fraction above 0 of a single scene.
    """
    sizes = Counter(sample.scene for sample in dataset.samples)
    if fraction > 0 and len(sizes) < 2:
        raise DataError(
            f"{dataset.name}: one scene cannot be parted into training and validation; set data.val_fraction to 0"
        )
    order = sorted(sizes, key=lambda scene: hashlib.sha256(f"{seed}:{scene}".encode()).hexdigest())
    chosen, left = set[str](), fraction * len(dataset)
    for scene in order:
        if len(chosen) + 1 < len(order) and abs(left - sizes[scene]) < left:
            chosen.add(scene)
            left -= sizes[scene]
    if fraction > 0 and not chosen:
        chosen.add(min(order, key=sizes.__getitem__))
    train, val = ([s for s in dataset.samples if (s.scene in chosen) == held_out] for held_out in (False, True))
    return replace(dataset, split="train", samples=tuple(train)), replace(dataset, split="val", samples=tuple(val))


def _common_folder(folders: Sequence[str]) -> str:
    """The folder that all lie below; a list may hold relative paths beside absolute ones, and URLs."""
    if not any("://" in folder for folder in folders):
        folders = [os.path.abspath(folder) for folder in folders]
    try:
        return os.path.commonpath(folders)
    except ValueError:
        return "/"


def with_unique_ids(samples: Sequence[Sample], source: AnyPath) -> tuple[Sample, ...]:
    """The samples, those that share a file name distinguished by their path below the common folder.

    Raises:
        DataError: one file appears twice.
    """
    counts = Counter(s.image_id for s in samples)
    if len(counts) < len(samples):
        common = _common_folder([str(s.path.parent) for s in samples])
        samples = [
            s if counts[s.image_id] == 1 else replace(s, image_id=Path(os.path.relpath(str(s.path), common)).as_posix())
            for s in samples
        ]
    for image_id, count in Counter(s.image_id for s in samples).items():
        if count > 1:
            raise DataError(f"{source}: image {image_id!r} appears {count} times; image names must be unique")
    return tuple(samples)
