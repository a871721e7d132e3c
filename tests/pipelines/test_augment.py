"""Boxes and masks move with the pixels."""

import numpy as np
import pytest

from models.engines.unet.settings import SegmenterArchitecture
from models.geometry.boxes import box_iou
from models.geometry.rle import CropMask, rle_boxes, rle_decode, rle_encode
from pipelines.data.loading import augment
from pipelines.data.loading.augment import (
    Augmentation,
    jitter_light,
    move_boxes,
    move_mask,
    place_window,
    random_linear,
    random_window,
    turned_whole,
    warp,
)
from pipelines.data.loading.batches import DetectorBatches, SegmenterBatches, epoch_items
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.training.detector import train_detector

STRONG = Augmentation(rotation=0, scale=0.4, brightness=0.3, contrast=0.3, saturation=0.5, grayscale=0.2)


def _picture():
    image = np.zeros((300, 400, 3), np.uint8)
    image[120:160, 200:290] = 255
    return image, np.array([[200, 120, 290, 160]], np.float32)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_the_pixels_of_a_window(seed):
    image, boxes = _picture()
    window, affine = random_window(np.random.default_rng(seed), image, boxes, settings=STRONG, size=256, focus=1.0)
    moved, kept = move_boxes(boxes, affine, 256, 0.01)
    assert kept.tolist() == [0]
    drawn = rle_boxes([rle_encode(window[:, :, 0] >= 128)])
    assert box_iou(moved, drawn)[0, 0] > 0.93


@pytest.mark.parametrize("seed", range(8))
def test_boxes_follow_the_pixels_of_a_whole_image(seed):
    image, boxes = _picture()
    turned, affine = turned_whole(image, random_linear(np.random.default_rng(seed), Augmentation()))
    moved, _ = move_boxes(boxes, affine, turned.shape[:2], 0.01)
    assert sorted(turned.shape[:2]) == [300, 400]
    assert turned.sum() == image.sum()
    assert rle_boxes([rle_encode(turned[:, :, 0] > 0)]).tolist() == moved.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_masks_follow_the_pixels_of_a_turned_and_scaled_image(seed):
    image, _ = _picture()
    settings = Augmentation(rotation=40, scale=0.5)
    turned, affine = turned_whole(image, random_linear(np.random.default_rng(seed), settings))
    moved = move_mask(CropMask(image[120:160, 200:290, 0] > 0, 200, 120), affine, turned.shape[:2])
    drawn = turned[:, :, 0] >= 128
    assert (moved & drawn).sum() / (moved | drawn).sum() > 0.97
    # Nothing of a turned image is lost at the edges of its canvas.
    assert np.isclose(moved.sum(), 40 * 90 * abs(np.linalg.det(affine[:, :2])), rtol=0.05)


@pytest.mark.parametrize("zoom", [0.3, 1.0, 1.7])
def test_masks_follow_the_pixels_of_a_window(zoom):
    image, boxes = _picture()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        window, affine = random_window(
            rng, image, boxes, settings=Augmentation(rotation=30), size=160, focus=1.0, zoom=zoom
        )
        moved = move_mask(CropMask(image[120:160, 200:290, 0] > 0, 200, 120), affine, (160, 160))
        drawn = window[:, :, 0] >= 128
        assert (moved & drawn).sum() / (moved | drawn).sum() > 0.93


def test_whole_images_are_fitted_with_their_boxes_and_masks(airfield):
    data = open_dataset(str(airfield), "train")
    batches = DetectorBatches(
        data,
        Augmentation(),
        batch_size=2,
        window=None,
        focus=0.8,
        min_visible=0.3,
        seed=7,
        masks=True,
        edges=(128, 160),
        max_edge=200,
    )
    examples = [e for step in range(3) for e in batches[step]]
    assert {e.image.shape for e in examples} <= {(128, 128, 3), (160, 160, 3)}
    for example in examples:
        assert example.masks.shape == (len(example.boxes), *example.image.shape[:2])
        assert rle_boxes([rle_encode(m) for m in example.masks]).tolist() == example.boxes.tolist()
    assert sum(len(e.boxes) for e in examples) > 20


def test_processes_share_a_batch_without_gaps(airfield):
    batches = DetectorBatches(
        open_dataset(str(airfield), "train"), STRONG, batch_size=4, window=128, focus=0.8, min_visible=0.3, seed=7
    )
    whole, shares = batches[3], [batches.share(3, rank, 2) for rank in range(2)]
    assert [e.image.tobytes() for e in whole[::2]] == [e.image.tobytes() for e in shares[0]]
    assert [e.image.tobytes() for e in whole[1::2]] == [e.image.tobytes() for e in shares[1]]


@pytest.mark.parametrize("zoom", [0.3, 0.55, 1.6])
def test_boxes_follow_the_pixels_at_any_zoom(zoom):
    image, boxes = _picture()
    for seed in range(6):
        window, affine = random_window(
            np.random.default_rng(seed), image, boxes, settings=Augmentation(), size=160, focus=1.0, zoom=zoom
        )
        moved, _ = move_boxes(boxes, affine, 160, 0.01)
        drawn = rle_boxes([rle_encode(window[:, :, 0] >= 128)])
        assert np.abs(moved - drawn).max() <= 1.0


def test_quarter_turns_and_mirrors_change_no_pixel_value():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    seen = set()
    for seed in range(60):
        linear = random_linear(np.random.default_rng(seed), Augmentation())
        affine = np.concatenate([linear, (32 - linear @ [32, 32])[:, None]], 1)
        window = warp(image, affine, 64)
        assert np.sort(window, axis=None).tolist() == np.sort(image, axis=None).tolist()
        seen.add(window.tobytes())
    assert len(seen) == 8


def test_a_sliver_of_a_plane_does_not_count():
    boxes = np.array([[-90, 10, 10, 60], [-20, 10, 80, 60]], np.float32)
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    moved, kept = move_boxes(boxes, identity, 100, 0.35)
    assert kept.tolist() == [1]
    assert moved.tolist() == [[0, 10, 80, 60]]


def test_light_is_left_alone_at_strength_zero():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.abs(jitter_light(np.random.default_rng(0), image, Augmentation()).astype(int) - image).max() <= 1
    assert jitter_light(np.random.default_rng(0), image, Augmentation(grayscale=1)).std(axis=2).max() == 0


def test_batches_depend_on_the_step_alone(airfield):
    data = open_dataset(airfield, "train")
    first, second = (
        DetectorBatches(data, STRONG, batch_size=2, window=128, focus=0.8, min_visible=0.3, seed=7) for _ in range(2)
    )
    first[0], first[1]
    for one, again in zip(first[5], second[5], strict=True):
        assert one.image.tobytes() == again.image.tobytes()
        assert one.boxes.tobytes() == again.boxes.tobytes()
    assert first[4][0].image.tobytes() != first[5][0].image.tobytes()


def test_every_item_is_seen_once_an_epoch():
    items = [i for step in range(15) for i in epoch_items(3, step, 4, 20)]
    for epoch in range(3):
        assert sorted(items[20 * epoch : 20 * (epoch + 1)]) == list(range(20))
    assert items[:20] != items[20:40]


@pytest.mark.parametrize("rotation", [0, 60])
def test_crops_are_filled_by_their_plane(airfield, rotation):
    data = open_dataset(airfield, "train")
    settings = Augmentation(rotation=rotation)
    batches = SegmenterBatches(data, settings, SegmenterArchitecture(crop_size=64), batch_size=8, box_jitter=0.0, seed=0)
    crops, masks = batches[0]
    assert crops.shape == (8, 64, 64, 3)
    assert masks.shape == (8, 64, 64)
    for mask in masks:
        rows, columns = np.nonzero(mask > 0.5)
        # A tight box touches all four borders, to the pixel that resampling may cost.
        assert max(rows.min(), columns.min(), 63 - rows.max(), 63 - columns.max()) <= 4


def test_without_augmentation_a_crop_is_the_box(airfield):
    data = open_dataset(airfield, "train")
    plain = Augmentation(mirror=False, quarter_turns=False)
    batches = SegmenterBatches(data, plain, SegmenterArchitecture(crop_size=64), batch_size=1, box_jitter=0.0, seed=0)
    _, masks = batches[0]
    best = 0.0
    for sample in data.samples:
        for mask, box in zip(sample.masks, sample.boxes.astype(int), strict=True):
            x1, y1, x2, y2 = box
            import cv2

            crop = cv2.resize(rle_decode(mask)[y1:y2, x1:x2].astype(np.float32), (64, 64))
            a, b = crop > 0.5, masks[0] > 0.5
            best = max(best, (a & b).sum() / (a | b).sum())
    assert best > 0.9


def test_hue_turns_colours_and_leaves_gray():
    rng = np.random.default_rng(0)
    colours = rng.uniform(0, 255, (50, 3))
    colours -= colours.mean(axis=1, keepdims=True)
    # A third of the circle moves each channel to the next one.
    turned = colours @ augment.turned_hue(1 / 3)
    assert np.allclose(turned, np.roll(colours, 1, axis=1), atol=1e-3) or np.allclose(
        turned, np.roll(colours, -1, axis=1), atol=1e-3
    )
    assert np.allclose(colours @ augment.turned_hue(0.2) @ augment.turned_hue(-0.2), colours, atol=1e-3)
    gray = np.repeat(rng.integers(0, 256, (20, 20, 1), dtype=np.uint8), 3, axis=2)
    assert (augment.jitter_light(rng, gray, augment.Augmentation(hue=0.5)) == gray).all()


def test_light_and_colour_are_changed_as_the_formula_says():
    settings = Augmentation(brightness=0.4, contrast=0.5, saturation=0.7, hue=0.5, grayscale=0.3)
    image = np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = image.astype(np.float64)
        gray = values @ [0.299, 0.587, 0.114]
        colour = 0.0 if rng.random() < 0.3 else 1 + rng.uniform(-1, 1) * 0.7
        values = (values - gray[:, :, None]) * colour
        if colour:
            values = values @ augment.turned_hue(rng.uniform(-1, 1) * 0.5)
        values += gray[:, :, None]
        values = gray.mean() + (values - gray.mean()) * (1 + rng.uniform(-1, 1) * 0.5)
        values *= 1 + rng.uniform(-1, 1) * 0.4
        changed = jitter_light(np.random.default_rng(seed), image, settings)
        # OpenCV computes with fixed points.
        assert np.abs(changed - values.clip(0, 255)).max() <= 1


def _edges(image):
    return np.abs(np.diff(image.astype(int), axis=1)).mean()


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({"haze": 0.9}, lambda a, b: b.std() < a.std() and b.mean() > a.mean()),
        ({"blur": 5.0}, lambda a, b: _edges(b) < _edges(a)),
        ({"noise": 30.0}, lambda a, b: abs(b.mean() - a.mean()) < 6 and (a != b).mean() > 0.4),
        ({"gamma": 2.0}, lambda a, b: (np.diff([int(b[a == v][0]) for v in np.unique(a)]) >= 0).all()),
        ({"colour_cast": 0.5}, lambda a, b: np.ptp(b.mean(axis=(0, 1)) / a.mean(axis=(0, 1))) > 0.01),
    ],
)  # fmt: skip
def test_each_change_does_what_it_is_called_and_leaves_others_alone(settings, holds):
    image = np.random.default_rng(0).integers(10, 120, (60, 60, 3), dtype=np.uint8)
    kinds = [jitter_light(np.random.default_rng(seed), image, Augmentation(**settings)) for seed in range(40)]
    changed = [k for k in kinds if (k != image).any()]
    # Haze, blur and noise come upon half of the examples.
    half = next(iter(settings)) in ("haze", "blur", "noise")
    assert 8 < len(changed) < 34 if half else len(changed) > 36
    assert all(holds(image, k) for k in changed)
    again = jitter_light(np.random.default_rng(3), image, Augmentation(**settings))
    assert (again == kinds[3]).all()


def test_planes_of_all_sizes_come_out_in_the_range_asked_for():
    image = np.zeros((2000, 2000, 3), np.uint8)
    # A plane of 30 pixels is enlarged twice at most; the others fill the whole range.
    for box, largest in (([100, 100, 130, 120], 60), ([500, 500, 900, 700], 160), ([1200, 1200, 1280, 1300], 160)):
        sides = []
        for seed in range(200):
            _, affine = random_window(
                np.random.default_rng(seed), image, np.array([box]), settings=Augmentation(), size=320, focus=1.0,
                plane_sizes=(40, 160),
            )  # fmt: skip
            scale = np.sqrt(abs(np.linalg.det(affine[:, :2])))
            sides.append(max(box[2] - box[0], box[3] - box[1]) * scale)
        assert min(sides) >= 39.9
        assert max(sides) == pytest.approx(largest, abs=4)
        # Evenly on a logarithmic scale: half of them below the geometric mean.
        assert largest == 60 or 0.4 < np.mean(np.array(sides) < 80) < 0.6


def test_windows_of_images_without_planes_have_a_scale_too():
    image, scales = np.zeros((900, 900, 3), np.uint8), []
    for seed in range(50):
        _, affine = random_window(
            np.random.default_rng(seed), image, np.zeros((0, 4)), settings=Augmentation(), size=100, focus=0.5,
            plane_sizes=(50, 200),
        )  # fmt: skip
        scales.append(np.sqrt(abs(np.linalg.det(affine[:, :2]))))
    assert (pytest.approx(min(scales), abs=0.1), pytest.approx(max(scales), abs=0.2)) == (0.49, 2.01)


def test_the_recipe_s_scales_reach_the_windows(monkeypatch, airfield, tmp_path):
    class CapturedError(Exception):
        pass

    def capture(*_, **settings):
        raise CapturedError(settings)

    monkeypatch.setattr("pipelines.training.detector.DetectorBatches", capture)
    data = open_dataset(str(airfield), "train")
    for overrides, zoom in ((("window_zoom=1",), 1.0), (("window_zoom=0.5", "architecture.zoom=0.5"), 0.25)):
        recipe = load_recipe("detector_scratch", (*overrides, "plane_sizes=[20,90]", "synthetic=null"))
        with pytest.raises(CapturedError) as caught:
            train_detector(recipe, data, None, folder=tmp_path, device="cpu")
        assert (caught.value.args[0]["zoom"], caught.value.args[0]["plane_sizes"]) == (zoom, (20, 90))


@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_planes_have_the_size_asked_for_at_any_scale_of_the_windows(zoom):
    box = np.array([[400, 400, 480, 440]])
    for seed in range(20):
        affine = place_window(
            np.random.default_rng(seed), (1000, 1000), box, settings=Augmentation(), size=300, focus=1.0, zoom=zoom,
            plane_sizes=(60, 60),
        )  # fmt: skip
        assert 80 * np.sqrt(abs(np.linalg.det(affine[:, :2]))) == pytest.approx(60)
