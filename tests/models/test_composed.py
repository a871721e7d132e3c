"""Detector and U-Net as one: overlaps, order, self-containedness, the contract."""

import json
import shutil

import numpy as np
import pytest

from models.engines.composed import ComposedArchitecture, ComposedPredictor, save_composed, without_overlaps
from models.errors import ModelError
from models.geometry.rle import CropMask, rle_decode
from models.instances import Instances
from models.loading import load_model
from models.saved.spec import read_spec
from tests.models.test_contract import MAKERS, _images


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components")
    return MAKERS["detector"](folder / "det"), MAKERS["unet"](folder / "unet")


def test_a_pixel_belongs_to_the_plane_of_the_higher_score():
    rng = np.random.default_rng(0)
    crops = [CropMask(rng.random((12, 9)) < 0.7, int(x), int(y)) for x, y in rng.integers(0, 20, (8, 2))]
    dense = np.zeros((8, 40, 40), bool)
    for i, crop in enumerate(crops):
        dense[i, crop.top : crop.top + 12, crop.left : crop.left + 9] = crop.mask
    first = np.where(dense.any(0), dense.argmax(0), -1)
    for i, crop in enumerate(without_overlaps(crops)):
        expected = (first == i)[crop.top : crop.top + 12, crop.left : crop.left + 9]
        assert np.array_equal(crop.mask, expected)


def test_masks_of_many_images_equal_those_of_each(components, tmp_path):
    saved = save_composed(
        tmp_path / "c",
        *components,
        ComposedArchitecture(overlaps="keep"),
        components={"detector": "d/1", "segmenter": "u/2"},
    )
    composed, detector, segmenter = load_model(saved), load_model(components[0]), load_model(components[1])
    images = _images()
    for together, image in zip(composed.predict(images), images, strict=True):
        detections = detector.predict([image])[0]
        assert np.allclose(together.boxes, detections.boxes, atol=1e-2)
        masks = segmenter.masks_in_boxes([image], [detections.boxes])[0]
        agree = [np.mean(rle_decode(a) == rle_decode(b)) for a, b in zip(together.masks, masks, strict=True)]
        # Sums over a batch may be ordered otherwise: a pixel at the threshold may fall either way.
        assert min(agree) > 0.99


def test_exclusive_masks_share_no_pixel(components, tmp_path):
    for overlaps in ("exclusive", "keep"):
        saved = save_composed(tmp_path / overlaps, *components, ComposedArchitecture(overlaps=overlaps), components={})
        layers = sum(rle_decode(m).astype(int) for m in load_model(saved).predict(_images(1))[0].masks)
        assert (layers.max() == 1) == (overlaps == "exclusive")


def test_planes_without_a_pixel_are_no_planes():
    class Detector:
        def predict(self, images):
            return [Instances.make("0", 20, 20, [[1, 1, 9, 9], [2, 2, 8, 8], [12, 12, 18, 18]], [0.9, 0.8, 0.7])]

    class Segmenter:
        def crop_masks(self, images, boxes):
            return [
                [CropMask(np.ones((int(y2 - y1), int(x2 - x1)), bool), int(x1), int(y1)) for x1, y1, x2, y2 in boxes[0]]
            ]

    composed = ComposedPredictor(Detector(), Segmenter(), ComposedArchitecture())
    detections = composed.predict([np.zeros((20, 20, 3), np.uint8)])[0]
    assert detections.scores.tolist() == pytest.approx([0.9, 0.7])


def test_low_scores_are_not_segmented(components, tmp_path):
    everything = load_model(components[0]).predict(_images(1))[0]
    middle = float(np.median(everything.scores))
    saved = save_composed(
        tmp_path / "c", *components, ComposedArchitecture(min_score=middle, overlaps="keep"), components={}
    )
    detections = load_model(saved).predict(_images(1))[0]
    assert 0 < len(detections) < len(everything)
    assert detections.scores.min() >= middle


def test_the_folder_loads_alone_and_says_where_it_comes_from(components, tmp_path):
    copies = [shutil.copytree(p, tmp_path / p.name) for p in components]
    saved = save_composed(
        tmp_path / "c", *copies, ComposedArchitecture(), components={"detector": "planes-det/3", "segmenter": "u/2"}
    )
    for copy in copies:
        shutil.rmtree(copy)
    assert read_spec(saved).versions["detector.version"] == "planes-det/3"
    assert load_model(saved).predict(_images())[0].masks is not None


def test_components_of_the_wrong_kind_are_refused(components, tmp_path):
    detector, segmenter = components
    with pytest.raises(ModelError, match="u/2: is a segmenter, a detector is needed"):
        save_composed(tmp_path / "c", segmenter, segmenter, ComposedArchitecture(), components={"detector": "u/2"})
    saved = save_composed(tmp_path / "c", detector, segmenter, ComposedArchitecture(), components={})
    shutil.rmtree(saved / "segmenter")
    with pytest.raises(ModelError, match="not a saved model"):
        load_model(saved)
    shutil.copytree(detector, saved / "segmenter")
    with pytest.raises(ModelError, match="is a detector, a segmenter is needed"):
        load_model(saved)
    content = json.loads((saved / "model.json").read_text())
    content["architecture"]["overlap"] = "keep"
    (saved / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"architecture\.overlap"):
        load_model(saved)
