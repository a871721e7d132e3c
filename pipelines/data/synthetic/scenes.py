"""Synthetic airfields: aerial-looking scenes with exact boxes and masks; the same seed gives the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from models.errors import DataError
from models.geometry.boxes import xyxy_to_xywh
from models.geometry.rle import rle_area, rle_boxes, rle_paste
from models.instances import RLE
from pipelines.data.synthetic import ground
from pipelines.data.synthetic.aircraft import FIGHTERS, Patch, draw_aircraft, random_aircraft
from pipelines.files import write_bytes
from pipelines.locking import held, lock_of

FORMAT = 1  # raised whenever the same settings would draw other bytes


@dataclass(frozen=True, kw_only=True)
class AirfieldSettings:
    """What to draw.

    Attributes:
        train: scenes of the training split.
        test: scenes of the test split.
        size: side of a scene in pixels.
        planes_min: fewest planes of a scene.
        planes_max: most planes of a scene.
        length_min: shortest plane in pixels.
        length_max: longest plane in pixels.
        seed: the same seed draws the same scenes.
        fighters: share of the planes that are fighters.
    """

    train: int = 60
    test: int = 12
    size: int = 1024
    planes_min: int = 12
    planes_max: int = 30
    length_min: float = 26.0
    length_max: float = 130.0
    seed: int = 0
    fighters: float = FIGHTERS


@dataclass(frozen=True)
class Scene:
    """One drawn scene: image RGB uint8 (S, S, 3) and the visible pixels of each plane as RLE."""

    image: np.ndarray
    masks: list[RLE]


def draw_scene(settings: AirfieldSettings, split: str, index: int) -> Scene:
    """Draw scene ``index`` of ``split``; depends on nothing but its arguments."""
    rng = np.random.default_rng([settings.seed, {"train": 0, "test": 1}[split], index])
    size = settings.size
    image = ground.ground(rng, size)
    sun = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(sun), np.sin(sun)])
    shadow = -light * rng.uniform(6, 18)
    angle = float(rng.uniform(0, np.pi))
    taken = np.zeros((size, size), bool)
    aprons = _lay_out(rng, image, angle)
    _furnish(rng, image, taken=taken, aprons=aprons, angle=angle, shadow=shadow)
    masks = _park(rng, settings, image, taken=taken, aprons=aprons, light=light, shadow=shadow)
    return Scene(_expose(rng, image), masks)


def _lay_out(rng: np.random.Generator, image: np.ndarray, angle: float) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Draw runway, taxiways and aprons; return the aprons as (centre, extent, angle)."""
    size = len(image)
    if rng.random() < 0.7:
        ground.runway(rng, image, rng.uniform(0.1, 0.9, 2) * size, angle=angle, width=rng.uniform(56, 96))
    for _ in range(rng.integers(1, 3)):
        extent = np.array([size * 2.0, rng.uniform(26, 44)])
        turned = angle + rng.choice([0.0, np.pi / 2])
        ground.pavement(rng, image, rng.uniform(0.1, 0.9, 2) * size, extent=extent, angle=turned)
    aprons = []
    for _ in range(rng.integers(2, 4)):
        centre, extent = rng.uniform(0.15, 0.85, 2) * size, rng.uniform(0.35, 0.75, 2) * size
        ground.pavement(rng, image, centre, extent=extent, angle=angle)
        aprons.append((centre, extent, angle))
    return aprons


def _furnish(
    rng: np.random.Generator,
    image: np.ndarray,
    *,
    taken: np.ndarray,
    aprons: list[tuple[np.ndarray, np.ndarray, float]],
    angle: float,
    shadow: np.ndarray,
) -> None:
    """Draw buildings, vehicles and distractors; buildings and distractors are marked in ``taken``."""
    size = len(image)
    for _ in range(rng.integers(3, 9)):
        extent = np.array([rng.uniform(40, 190), rng.uniform(26, 80)])
        footprint = ground.building(rng, image, rng.uniform(0, size, 2), extent=extent, angle=angle, shadow=shadow)
        taken |= cv2.dilate(footprint.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    for _ in range(rng.integers(14, 40)):
        centre = _spot(rng, aprons, size)
        x, y = (int(v) for v in centre.clip(0, size - 1))
        if not taken[y, x]:
            ground.vehicle(rng, image, centre, angle=float(rng.uniform(0, 2 * np.pi)), shadow=shadow)
    for _ in range(rng.integers(4, 10)):
        centre, width = _spot(rng, aprons, size), float(rng.uniform(24, 80))
        x, y = (int(v) for v in centre.clip(0, size - 1))
        if taken[y, x]:
            continue
        ground.distractor(rng, image, centre, size=width, shadow=shadow)
        disc = np.zeros((size, size), np.uint8)
        cv2.circle(disc, (x, y), int(width * 0.55) + 3, 1, -1)
        taken |= disc.astype(bool)


def _spot(rng: np.random.Generator, aprons: list[tuple[np.ndarray, np.ndarray, float]], size: int) -> np.ndarray:
    """A random place: mostly on an apron, sometimes anywhere."""
    if rng.random() < 0.25:
        return rng.uniform(0, size, 2)
    centre, extent, angle = aprons[rng.integers(len(aprons))]
    offset = rng.uniform(-0.5, 0.5, 2) * extent
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return centre + offset @ turn


def _park(
    rng: np.random.Generator,
    settings: AirfieldSettings,
    image: np.ndarray,
    *,
    taken: np.ndarray,
    aprons: list[tuple[np.ndarray, np.ndarray, float]],
    light: np.ndarray,
    shadow: np.ndarray,
) -> list[RLE]:
    """Place planes one by one where nothing is yet, most of them in one direction of parking."""
    size = settings.size
    masks: list[RLE] = []
    wanted = int(rng.integers(settings.planes_min, settings.planes_max + 1))
    parked = aprons[0][2] + rng.choice([0, np.pi / 2, np.pi, -np.pi / 2])
    for _ in range(wanted * 12):
        if len(masks) == wanted:
            break
        heading = parked + rng.normal(0, 0.08) if rng.random() < 0.45 else rng.uniform(0, 2 * np.pi)
        length = float(np.exp(rng.uniform(np.log(settings.length_min), np.log(settings.length_max))))
        plane = random_aircraft(rng, settings.fighters)
        drawn = draw_aircraft(plane, tuple(_spot(rng, aprons, size)), length, float(heading), light)
        patch = _inside(drawn, size)
        # A plane of which the border leaves a sliver is no sensible truth.
        if patch is None or patch.mask.sum() < 0.02 * length**2 or patch.mask.sum() < 24:
            continue
        region = (slice(patch.top, patch.top + len(patch.mask)), slice(patch.left, patch.left + patch.mask.shape[1]))
        grown = cv2.dilate(patch.mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
        if (taken[region] & grown).any():
            continue
        _paint(image, patch, shadow * length / 110)
        taken[region] |= grown
        masks.append(rle_paste(patch.mask, patch.left, patch.top, size, size))
    return masks


def _inside(patch: Patch, size: int) -> Patch | None:
    """The patch cut to the scene; None where too little of it is left."""
    rows, columns = patch.coverage.shape
    x1, y1 = max(patch.left, 0), max(patch.top, 0)
    x2, y2 = min(patch.left + columns, size), min(patch.top + rows, size)
    if x2 - x1 < 3 or y2 - y1 < 3:
        return None
    cut = (slice(y1 - patch.top, y2 - patch.top), slice(x1 - patch.left, x2 - patch.left))
    return Patch(patch.coverage[cut], patch.colour[cut], x1, y1)


def _paint(image: np.ndarray, patch: Patch, shadow: np.ndarray) -> None:
    """Blend the plane's shadow, then the plane, into the image in place."""
    rows, columns = patch.coverage.shape
    size = len(image)
    pad = int(np.abs(shadow).max()) + 2
    x1, y1 = max(patch.left - pad, 0), max(patch.top - pad, 0)
    x2, y2 = min(patch.left + columns + pad, size), min(patch.top + rows + pad, size)
    move = np.array([[1, 0, patch.left - x1 + shadow[0]], [0, 1, patch.top - y1 + shadow[1]]], np.float32)
    shade = cv2.warpAffine(patch.coverage, move, (x2 - x1, y2 - y1))
    image[y1:y2, x1:x2] *= 1 - 0.5 * cv2.GaussianBlur(shade, (3, 3), 0)[:, :, None]
    cover = patch.coverage[:, :, None]
    region = image[patch.top : patch.top + rows, patch.left : patch.left + columns]
    region[:] = region * (1 - cover) + patch.colour * cover


def _expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Haze, gain, slight blur and sensor noise; one scene in ten is grayscale as in iSAID."""
    gain, haze = rng.uniform(0.68, 1.02), rng.uniform(0, 24)
    image = image * gain * rng.uniform(0.95, 1.05, 3).astype(np.float32) + haze
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), rng.uniform(0.35, 0.75))
    image = image + rng.standard_normal(image.shape).astype(np.float32) * rng.uniform(1.5, 4.5)
    if rng.random() < 0.1:
        image = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    return image.round().clip(0, 255).astype(np.uint8)


def prepare_airfield(
    folder: Path, settings: AirfieldSettings, progress: Callable[[Iterator, int], Iterator] | None = None
) -> bool:
    """Write ``train/``, ``test/`` with PNG scenes and ``train_coco.json``, ``test_coco.json``.

    Scenes are numbered across both splits. Returns False, doing nothing, where the
    folder already holds exactly these settings. An interrupted call is simply made again; of
    two at once one waits for the other.

    Raises:
        DataError: the folder holds something else.
        OutputError: the folder's lock cannot be written.
    """
    with held(lock_of(folder), f"drawing the airfield {folder}", wait=True):
        return _prepare(folder, settings, progress)


def _prepare(folder: Path, settings: AirfieldSettings, progress: Callable[[Iterator, int], Iterator] | None) -> bool:
    # Says that what is in the folder is ours, until the marker says that it is whole.
    marker, begun = folder / "airfield.json", folder / "airfield.begun"
    made = {"format": FORMAT, **asdict(settings)}
    if settings.fighters == FIGHTERS:
        # As folders of releases without this setting have it.
        del made["fighters"]
    if marker.exists():
        if json.loads(marker.read_text()) == made:
            return False
        raise DataError(f"{folder}: holds an airfield of other settings ({marker.name}); name another folder or delete it")
    if begun.exists():
        if begun.read_text() != json.dumps(made):
            raise DataError(f"{folder}: holds an unfinished airfield of other settings; name another folder or delete it")
    elif folder.exists() and any(p.name not in ("train", "test") for p in folder.iterdir()):
        raise DataError(f"{folder}: not empty and not an airfield; name another folder")
    write_bytes(begun, json.dumps(made).encode())
    jobs = [(settings, split, i, str(folder)) for split in ("train", "test") for i in range(getattr(settings, split))]
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    # Forking a process that already runs torch's or OpenCV's threads can hang for ever.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(os.cpu_count() or 1, 8), mp_context=spawn) as pool:
        results = pool.map(_write_scene, jobs)
        entries = list(progress(results, len(jobs)) if progress else results)
    for split in ("train", "test"):
        mine = [(name, masks) for (_, s, _, _), (name, masks) in zip(jobs, entries, strict=True) if s == split]
        content = json.dumps(_coco(mine, settings.size)).encode()
        write_bytes(folder / f"{split}_coco.json", content)
    write_bytes(marker, json.dumps(made, indent=2).encode())
    begun.unlink(missing_ok=True)
    return True


def _write_scene(job: tuple[AirfieldSettings, str, int, str]) -> tuple[str, list[RLE]]:
    settings, split, index, folder = job
    cv2.setNumThreads(1)
    scene = draw_scene(settings, split, index)
    name = f"A{(0 if split == 'train' else settings.train) + index:04d}.png"
    if not cv2.imwrite(str(Path(folder) / split / name), cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)):
        raise DataError(f"{folder}/{split}/{name}: cannot be written")
    return name, scene.masks


def _coco(entries: list[tuple[str, list[RLE]]], size: int) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, masks) in enumerate(entries, start=1):
        images.append({"id": image_id, "file_name": name, "height": size, "width": size})
        for mask, box, area in zip(masks, xyxy_to_xywh(rle_boxes(masks)), rle_area(masks), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": box.tolist(),
                    "area": int(area),
                    "segmentation": mask,
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "plane"}]}
