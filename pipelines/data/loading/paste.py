"""Planes cut out by their outlines and pasted onto other ground.

G. Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021; unlike
there, a plane is pasted only where it hides no other, since planes on the ground do not overlap.
"""

from __future__ import annotations

import numpy as np

from models.geometry.boxes import box_iou
from models.geometry.rle import CropMask
from pipelines.data.loading.augment import warp

# Around an outline, so that the resampled edge has the plane's own surroundings in it and no black.
_MARGIN = 4
_TRIES = 5


def cut_out(image: np.ndarray, crop: CropMask) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of an outlined plane with a margin of 4 pixels, black beyond the image.

    Args:
        image: RGB uint8 (H, W, 3).
        crop: the plane's mask in its part of the image.

    Returns:
        RGB uint8 (h, w, 3) and its mask uint8 (h, w), 0 or 255.
    """
    rows, columns = crop.mask.shape
    top, left = crop.top - _MARGIN, crop.left - _MARGIN
    cut = np.zeros((rows + 2 * _MARGIN, columns + 2 * _MARGIN, 3), np.uint8)
    y1, x1 = max(top, 0), max(left, 0)
    shown = image[y1 : top + len(cut), x1 : left + cut.shape[1]]
    cut[y1 - top :, x1 - left :][: shown.shape[0], : shown.shape[1]] = shown
    return cut, np.pad(crop.mask.astype(np.uint8) * 255, _MARGIN)


def paste(
    rng: np.random.Generator, image: np.ndarray, plane: tuple[np.ndarray, np.ndarray], linear: np.ndarray, taken: np.ndarray
) -> np.ndarray | None:
    """Paste a plane at a random place of an image, in place.

    Args:
        image: RGB uint8 (H, W, 3), changed.
        plane: of `cut_out`.
        linear: (2, 2) map of the plane's pixels to those of the image.
        taken: boxes xyxy (K, 4) that are to stay visible.

    Returns:
        The plane's mask, uint8 (H, W), 1 where at least half of a pixel is the plane's; None where it was not
        pasted: no free place on visible ground was hit in 5 tries, it is larger than the image, or no pixel would be left.
    """
    cut, mask = plane
    corners = np.array([[0, 0], [cut.shape[1], 0], [0, cut.shape[0]], cut.shape[1::-1]]) @ linear.T
    low, extent = corners.min(0), np.ceil(np.ptp(corners, axis=0) - 1e-6).astype(int)
    height, width = image.shape[:2]
    if extent[0] > width or extent[1] > height:
        return None
    affine = np.concatenate([linear, -low[:, None]], axis=1)
    size = int(extent[1]), int(extent[0])
    share = warp(mask, affine, size)
    rows, columns = (np.flatnonzero((share >= 128).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    for _ in range(_TRIES):
        x, y = (int(rng.integers(room + 1)) for room in (width - size[1], height - size[0]))
        box = np.array([[x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]], np.float64)
        part = image[y : y + size[0], x : x + size[1]]
        # Black is no ground, but what lies outside the image.
        if (len(taken) and box_iou(box, taken).any()) or not part[share >= 128].any(axis=1).all():
            continue
        weight = share[:, :, None].astype(np.float32) / 255
        part[:] = (part + (warp(cut, affine, size) - part.astype(np.float32)) * weight).round().astype(np.uint8)
        pasted = np.zeros((height, width), np.uint8)
        pasted[y : y + size[0], x : x + size[1]] = share >= 128
        return pasted
    return None
