"""Scenes that show the same ground: near-duplicates, overlapping images, images whose coordinates meet.

Names tell the scene of a tile where they follow a pattern; where they do not, or where two names stand for one
place, what a model learnt of one would be measured on the other.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from models.errors import DataError
from models.images.raster import ground_bounds
from models.images.windows import open_image, shrunk
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.remote import UNREADABLE
from pipelines.progress import Progress, pass_through

log = logging.getLogger(__name__)

# Longer side in pixels at which images are compared, and features looked for in each.
SIDE, FEATURES = 960, 500
# Features that agree on one shift, turn and scale from which two images show the same ground. Measured on 68 tiles of
# DOTA: none of the 2,195 pairs of different scenes reaches it, 35 of the 83 pairs of one scene do (not all overlap).
AGREEING = 20
# Bits of 64 in which the hashes of near-duplicates differ at most, and the least correlation of their thumbnails.
BITS, CORRELATION = 8, 0.95
# Pairs grow with the square of the images: above so many, features are not compared.
MOST_COMPARED = 300


@dataclass(frozen=True)
class _Look:
    """What an image is recognised by: ``points`` (K, 2) and ``descriptors`` uint8 (K, 32), None without features."""

    bits: int
    thumbnail: np.ndarray | None
    points: np.ndarray
    descriptors: np.ndarray | None
    bounds: tuple[str, tuple[float, float, float, float]] | None


def with_joined_scenes(dataset: Dataset, progress: Progress = pass_through) -> Dataset:
    """The data set with one scene, called ``a+b``, for scenes that show the same ground.

    Joined are scenes with equal files, with near-duplicate images (difference hash, then correlation of thumbnails; not
    mirrored ones), with images that overlap (ORB features, Rublee et al., ICCV 2011, that agree on a similarity, by
    RANSAC; up to `MOST_COMPARED` images), and with images of one coordinate system whose bounds meet. Images that cannot
    be read are compared with none.
    """
    looks = [_look(s) for s in progress(dataset.samples, len(dataset), "looking for scenes that overlap")]
    pairs = {*_equal(dataset.file_digests()), *_near_duplicates(looks), *_meeting(looks)}
    if len(looks) <= MOST_COMPARED:
        pairs |= set(_overlapping(looks, [s.scene for s in dataset.samples]))
    else:
        log.info(f"{len(looks)} images, more than {MOST_COMPARED}: overlaps are not looked for; scenes go by names alone")
    scenes = [s.scene for s in dataset.samples]
    groups = _unions(scenes, ((scenes[a], scenes[b]) for a, b in pairs))
    sizes = Counter(groups.values())
    joined = sorted(g for g, size in sizes.items() if size > 1)
    if joined:
        log.info(f"scenes that show the same ground stay together: {'; '.join(joined[:5])}" + " ..." * (len(joined) > 5))
    if len(set(scenes)) == len(scenes) and joined:
        log.warning(
            f"names tell no scenes, but {sum(sizes[g] for g in joined)} of {len(scenes)} images show ground that "
            "another one shows; others of such a place may lie in another fold, which makes metrics too good: say how the "
            "names tell the scene with data.scene_pattern"
        )
    elif len(set(scenes)) == len(scenes) > 1:
        log.info("every image is a scene of its own; if several show one place, say so with data.scene_pattern")
    return replace(dataset, samples=tuple(replace(s, scene=groups[s.scene]) for s in dataset.samples))


def _look(sample: Sample) -> _Look:
    nothing = _Look(0, None, np.zeros((0, 2)), None, None)
    try:
        image = cv2.cvtColor(shrunk(sample.part_of(open_image(sample.path, sample.rendering)), SIDE), cv2.COLOR_RGB2GRAY)
    except Exception:
        # A decoder may raise anything; whoever reads the image for its planes says what is wrong with it.
        return nothing
    keys, descriptors = cv2.ORB_create(FEATURES).detectAndCompute(image, None)  # type: ignore[attr-defined]
    points = np.array([k.pt for k in keys], np.float64).reshape(-1, 2)
    thumbnail = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    # Of an image without contrast the hash says nothing.
    flat = thumbnail.std() < 2
    small = cv2.resize(image, (9, 8), interpolation=cv2.INTER_AREA)
    bits = int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")
    placed = ground_bounds(sample.path) if isinstance(sample.path, Path) and sample.window is None else None
    return _Look(bits, None if flat else thumbnail, points, descriptors, placed)


def _equal(digests: Sequence[str]) -> Iterable[tuple[int, int]]:
    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        if digest != UNREADABLE and first.setdefault(digest, i) != i:
            yield first[digest], i


def _near_duplicates(looks: Sequence[_Look]) -> Iterable[tuple[int, int]]:
    known = np.array([i for i, one in enumerate(looks) if one.thumbnail is not None], np.int64)
    hashes = np.array([looks[i].bits for i in known.tolist()], np.uint64)
    for k in range(len(known)):
        for other in np.flatnonzero(np.bitwise_count(hashes[:k] ^ hashes[k]) <= BITS).tolist():
            a, b = looks[known[other]].thumbnail, looks[known[k]].thumbnail
            assert a is not None
            assert b is not None
            if np.corrcoef(a.ravel(), b.ravel())[0, 1] >= CORRELATION:
                yield int(known[other]), int(known[k])


def _overlapping(looks: Sequence[_Look], scenes: Sequence[str]) -> Iterable[tuple[int, int]]:
    matcher = cv2.BFMatcher(cv2.NORM_HAMMING)
    with_features = [i for i, one in enumerate(looks) if one.descriptors is not None and len(one.points) >= AGREEING]
    for a, b in combinations(with_features, 2):
        if scenes[a] != scenes[b] and _agreeing(matcher, looks[a], looks[b]) >= AGREEING:
            yield a, b


def _agreeing(matcher: cv2.BFMatcher, first: _Look, second: _Look) -> int:
    """How many features of two images agree on one similarity."""
    assert first.descriptors is not None
    assert second.descriptors is not None
    pairs = [p for p in matcher.knnMatch(first.descriptors, second.descriptors, k=2) if len(p) == 2]
    # Lowe's ratio: a feature whose second best is nearly as good says nothing.
    good = [p[0] for p in pairs if p[0].distance < 0.75 * p[1].distance]
    if len(good) < AGREEING:
        return 0
    left, right = first.points[[m.queryIdx for m in good]], second.points[[m.trainIdx for m in good]]
    affine, inliers = cv2.estimateAffinePartial2D(left, right, ransacReprojThreshold=3)
    return 0 if affine is None else int(inliers.sum())


def _meeting(looks: Sequence[_Look]) -> Iterable[tuple[int, int]]:
    by_system: dict[str, list[int]] = {}
    for i, one in enumerate(looks):
        if one.bounds is not None:
            by_system.setdefault(one.bounds[0], []).append(i)
    for members in by_system.values():
        boxes = np.array([looks[i].bounds[1] for i in members])  # type: ignore[index]
        for k in range(1, len(members)):
            meets = (boxes[:k, :2] < boxes[k, 2:]).all(axis=1) & (boxes[:k, 2:] > boxes[k, :2]).all(axis=1)
            yield from ((members[j], members[k]) for j in np.flatnonzero(meets).tolist())


def _unions(scenes: Sequence[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Scene -> name of its group: its scenes in order, joined by ``+``."""
    leader = {scene: scene for scene in scenes}

    def find(scene: str) -> str:
        while leader[scene] != scene:
            leader[scene] = leader[leader[scene]]
            scene = leader[scene]
        return scene

    for a, b in pairs:
        leader[find(a)] = find(b)
    members: dict[str, list[str]] = {}
    for scene in sorted(leader):
        members.setdefault(find(scene), []).append(scene)
    return {scene: "+".join(group) for group in members.values() for scene in group}


def scene_folds(dataset: Dataset, count: int) -> list[Dataset]:
    """Part a data set into ``count`` folds of about as many images each; a scene is never divided.

    scikit-learn's GroupKFold, which goes by the scenes' names and sizes: the order of the files does not matter.
    Each fold is called ``fold-K`` of ``fold-1`` to ``fold-count``.

    Raises:
        DataError: fewer scenes than folds.
    """
    from sklearn.model_selection import GroupKFold

    samples = dataset.samples
    scenes = Counter(s.scene for s in samples)
    if len(scenes) < count:
        raise DataError(
            f"{dataset.name}: {len(scenes)} scenes cannot make {count} folds; give --folds {max(len(scenes), 2)} or fewer"
            if len(scenes) > 1
            else f"{dataset.name}: one scene cannot make folds; data.scene_pattern tells scenes apart by their names"
        )
    parts = GroupKFold(count).split(samples, groups=[s.scene for s in samples])
    chosen = [{samples[i].image_id for i in held_out} for _, held_out in parts]
    return [dataset.subset(ids, f"fold-{number}") for number, ids in enumerate(chosen, start=1)]
