"""Pasted planes: their pixels, boxes and masks, and what they must not hide."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from models.errors import DataError, RecipeError
from models.geometry.rle import CropMask, rle_boxes, rle_encode
from pipelines.data.loading.augment import Augmentation
from pipelines.data.loading.batches import DetectorBatches
from pipelines.data.loading.paste import cut_out, paste
from pipelines.data.loading.tiles import TileSettings, cut_tiles
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe

NONE = np.zeros((0, 4), np.float32)
RED, GREEN = (200, 10, 10), (10, 200, 10)


def _plane(left=60):
    """A red cross on green ground, 40 x 30 pixels, and its mask."""
    image = np.full((100, 100, 3), GREEN, np.uint8)
    mask = np.zeros((30, 40), bool)
    mask[12:18] = mask[:, 15:22] = True
    image[20:50, left : left + 40][mask] = RED
    return image, CropMask(mask, left, 20)


def _batches(data, paste_most, scale=0.3, **more):
    settings = {"batch_size": 4, "window": 160, "focus": 0.8, "min_visible": 0.3, "seed": 7} | more
    return DetectorBatches(data, Augmentation(paste=paste_most, scale=scale), **settings)


@pytest.mark.parametrize(("left", "scale"), [(30, 1.0), (60, 1.0), (0, 1.5), (60, 0.4)])
def test_the_plane_and_nothing_of_its_ground_is_pasted(left, scale):
    ground = np.full((120, 130, 3), 90, np.uint8)
    image = ground.copy()
    linear = np.array([[0, -scale], [scale, 0]])
    mask = paste(np.random.default_rng(3), image, cut_out(*_plane(left)), linear, NONE)
    assert mask.dtype == np.uint8
    assert mask.sum() == pytest.approx(_plane()[1].mask.sum() * scale**2, rel=0.2)
    x1, y1, x2, y2 = rle_boxes([rle_encode(mask)])[0]
    assert (x2 - x1, y2 - y1) == pytest.approx((30 * scale, 40 * scale), abs=1)
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8)).astype(bool)
    if scale >= 1:
        assert inner.any()
        assert np.abs(image[inner].astype(int) - RED).max() <= 3
    outside = cv2.dilate(mask, np.ones((3, 3), np.uint8)) == 0
    assert (image[outside] == 90).all()
    # Green is in no pixel beyond what a border of half a pixel mixes.
    assert (image[:, :, 1].astype(int) - image[:, :, 2]).max() <= 95


def test_no_plane_is_hidden_and_no_black_ground_is_covered():
    for seed in range(20):
        image = np.full((120, 130, 3), 90, np.uint8)
        image[:, 100:] = 0
        before = image.copy()
        taken = np.array([[0, 0, 100, 70]], np.float32)
        mask = paste(np.random.default_rng(seed), image, cut_out(*_plane()), np.eye(2), taken)
        assert (image[:70, :100] == before[:70, :100]).all()
        assert (image[:, 101:] == 0).all()
        if mask is None:
            assert (image == before).all()
            continue
        assert rle_boxes([rle_encode(mask)])[0][1] >= 70
    full = np.array([[0, 0, 130, 120]], np.float32)
    image = np.full((120, 130, 3), 90, np.uint8)
    assert paste(np.random.default_rng(0), image, cut_out(*_plane()), np.eye(2), full) is None
    assert (image == 90).all()


@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_a_plane_too_small_or_too_large_is_not_pasted(scale):
    image = np.full((120, 130, 3), 90, np.uint8)
    assert paste(np.random.default_rng(0), image, cut_out(*_plane()), np.eye(2) * scale, NONE) is None
    assert (image == 90).all()


def test_a_free_place_is_tried_five_times():
    taken = np.array([[0, 0, 130, 60]], np.float32)
    hits = 0
    for seed in range(100):
        image = np.full((120, 130, 3), 90, np.uint8)
        hits += paste(np.random.default_rng(seed), image, cut_out(*_plane()), np.eye(2), taken) is not None
    # 27 of 83 rows to begin at are free (the mask begins 4 below): in five tries 1 - (56 / 83) ** 5 = 86 %, in one 33 %.
    assert 84 <= hits <= 98


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("window", [160, None])
def test_examples_have_the_pasted_planes_too(airfield, masks, window):
    data = open_dataset(str(airfield), "train")
    plain, more = (_batches(data, most, masks=masks, window=window) for most in (0, 12))
    counts = [[len(e.boxes) for step in range(6) for e in batches[step]] for batches in (plain, more)]
    assert sum(counts[1]) > sum(counts[0]) + 12
    for example in more[2]:
        assert example.boxes.dtype == np.float32
        assert (example.boxes[:, 2:] > example.boxes[:, :2]).all()
        if masks:
            assert example.masks.shape == (len(example.boxes), *example.image.shape[:2])
            assert rle_boxes([rle_encode(m) for m in example.masks]).tolist() == example.boxes.tolist()
            # A pasted plane lies where none is.
            assert example.masks.sum(axis=0).max() <= max(e.masks.sum(axis=0).max() for e in plain[2])
    again = _batches(data, 12, masks=masks, window=window)[2]
    for one, other in zip(more[2], again, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.boxes.tobytes() == other.boxes.tobytes()


def test_planes_are_pasted_at_the_scale_of_the_windows(airfield):
    data = open_dataset(str(airfield), "train")
    sides = {}
    for zoom, sizes in ((1.0, None), (0.5, None), (1.0, (30, 31)), (0.5, (30, 31))):
        batches = _batches(data, 12, zoom=zoom, plane_sizes=sizes, window=256, min_visible=1.0)
        boxes = np.concatenate([e.boxes for step in range(8) for e in batches[step]])
        sides[zoom, sizes] = np.median((boxes[:, 2:] - boxes[:, :2]).max(axis=1))
    assert sides[0.5, None] == pytest.approx(sides[1.0, None] / 2, rel=0.2)
    assert sides[1.0, (30, 31)] == pytest.approx(30, abs=6)
    assert sides[0.5, (30, 31)] == pytest.approx(30, abs=6)


def test_planes_are_pasted_at_the_scale_of_fitted_images(airfield):
    data = open_dataset(str(airfield), "train")
    edge = min(data.samples[0].height, data.samples[0].width)
    sides = []
    for side in (edge, edge // 4):
        batches = _batches(data, 20, window=None, edges=(side,), max_edge=10_000)
        more = [e for step in range(8) for e in batches[step]]
        plain = [e for step in range(8) for e in _batches(data, 0, window=None, edges=(side,), max_edge=10_000)[step]]
        # Those that were pasted come last.
        pasted = np.concatenate([m.boxes[len(p.boxes) :] for m, p in zip(more, plain, strict=True)])
        assert len(pasted) > 10
        sides.append(np.median((pasted[:, 2:] - pasted[:, :2]).max(axis=1)))
    assert sides[1] == pytest.approx(sides[0] / 4, rel=0.4)


def test_the_image_that_is_kept_is_not_changed(airfield):
    data = open_dataset(str(airfield), "train")
    settings = Augmentation(paste=12, mirror=False, quarter_turns=False)
    batches = DetectorBatches(data, settings, batch_size=4, window=None, focus=0.8, min_visible=0.3, seed=7)
    for step in range(4):
        batches[step]
    for sample in data.samples:
        assert (batches._cache.read(sample) == sample.read()).all()


def test_one_at_most_is_one_or_none(airfield):
    data = open_dataset(str(airfield), "train")
    more, plain = ([len(e.boxes) for step in range(6) for e in _batches(data, most)[step]] for most in (1, 0))
    assert {m - p for m, p in zip(more, plain, strict=True)} == {0, 1}


def test_crowds_and_slivers_are_not_covered(airfield):
    data = open_dataset(str(airfield), "train")
    crowded = replace(
        data,
        samples=tuple(
            replace(
                s,
                boxes=np.concatenate([s.boxes, [[0, 0, s.width, s.height]]]).astype(np.float32),
                crowd=np.append(s.crowd, True),
                masks=(*s.masks, None),
            )
            for s in data.samples
        ),
    )
    more, plain = ([len(e.boxes) for step in range(4) for e in _batches(d, 12)[step]] for d in (data, crowded))
    assert sum(more) > sum(plain)
    assert plain == [len(e.boxes) for step in range(4) for e in _batches(data, 0)[step]]


def test_the_pixels_of_a_mask_are_those_of_its_plane(tmp_path):
    """Each image has red planes of its own shade at places of their own, on green ground."""
    (tmp_path / "train").mkdir()
    images, annotations = [], []
    for number in range(4):
        image = np.full((200, 200, 3), GREEN, np.uint8)
        for plane in range(3):
            x, y = 20 + 55 * plane, 30 + 35 * number
            image[y : y + 12 + 4 * number, x : x + 30] = (120 + 40 * number, 10, 10)
            outline = [[x, y, x + 30, y, x + 30, y + 12 + 4 * number, x, y + 12 + 4 * number]]
            box = [x, y, 30, 12 + 4 * number]
            annotations.append({"id": len(annotations), "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0})
            annotations[-1]["segmentation"] = outline
        cv2.imwrite(str(tmp_path / "train" / f"{number}.png"), image[:, :, ::-1])
        images.append({"id": number, "file_name": f"{number}.png", "height": 200, "width": 200})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "plane"}]}
    (tmp_path / "train_coco.json").write_text(json.dumps(content))
    batches = _batches(open_dataset(str(tmp_path), "train"), 6, scale=0, window=None, seed=0, masks=True)
    shades = []
    for example in (e for step in range(6) for e in batches[step]):
        assert len(example.masks) == len(example.boxes) >= 3
        found = set()
        for mask in example.masks:
            pixels = example.image[cv2.erode(mask, np.ones((3, 3), np.uint8)) > 0].astype(int)
            assert np.ptp(pixels, axis=0).max() <= 2
            assert pixels[:, 1].max() <= 12
            found.add(int(round((pixels[0, 0] - 120) / 40)))
        shades.append(found)
    # Its own planes and those of one other image at most; over all examples those of each.
    assert {len(found) for found in shades} == {1, 2}
    assert set.union(*shades) == {0, 1, 2, 3}
    assert len({tuple(sorted(found)) for found in shades if len(found) == 2}) >= 4


def test_planes_without_an_outline_stay_visible(airfield, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train").symlink_to(airfield / "train")
    content = json.loads((airfield / "train_coco.json").read_text())
    first = content["images"][0]["id"]
    for annotation in content["annotations"]:
        if annotation["image_id"] != first:
            del annotation["segmentation"]
    (folder / "train_coco.json").write_text(json.dumps(content))
    data = open_dataset(str(folder), "train")
    batches = _batches(data, 12)
    assert batches._donors == [0]
    for step in range(4):
        batches[step]
    # Boxes alone want no masks, so these are of what was pasted.
    assert {item for item, _ in batches._masks} == {0}
    assert len(batches._masks) > 3
    assert sum(len(e.boxes) for step in range(4) for e in batches[step]) > sum(
        len(e.boxes) for step in range(4) for e in _batches(data, 0)[step]
    )


def test_planes_that_a_border_cuts_are_not_pasted(airfield):
    data = open_dataset(str(airfield), "train")
    tiles = cut_tiles(data, TileSettings(size=96, overlap=0.2), 0.3)
    whole = _batches(tiles, 12)._whole
    cut = 0
    for place, sample in enumerate(tiles.samples):
        for plane in sample.outlined:
            x1, y1, x2, y2 = rle_boxes([sample.masks[plane]])[0]
            touches = x1 == 0 or y1 == 0 or x2 == sample.width or y2 == sample.height
            cut += touches
            assert not (touches and plane in whole.get(place, ()))
    assert cut > 10
    assert sum(map(len, whole.values())) > 10


def test_an_image_that_cannot_be_read_gives_no_planes(airfield, tmp_path):
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    for path in (airfield / "train").iterdir():
        (folder / "train" / path.name).write_bytes(path.read_bytes())
    (folder / "train_coco.json").write_bytes((airfield / "train_coco.json").read_bytes())
    data = open_dataset(str(folder), "train")
    data.samples[0].path.write_bytes(b"no image")
    batches = _batches(data, 12)
    for step in range(6):
        assert all(len(e.image) for e in batches[step])
    assert [path.endswith(data.samples[0].path.name) for path in batches.unreadable.messages()] == [True]


def test_nothing_to_cut_out_is_one_line(airfield, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train").symlink_to(airfield / "train")
    content = json.loads((airfield / "train_coco.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (folder / "train_coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no whole plane has an outline .* set augmentation\.paste=0"):
        _batches(open_dataset(str(folder), "train"), 3)


def test_crops_take_no_pasted_planes():
    with pytest.raises(RecipeError, match=r"augmentation\.paste is for detectors") as error:
        load_recipe("demo_unet", ["augmentation.paste=3"])
    assert len(str(error.value)) < 200
