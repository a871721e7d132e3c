"""Planes without a usable outline are left out for masks alone; the rest of the set is learnt and judged as ever."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from models.engines.unet.settings import SegmenterArchitecture
from models.geometry.boxes import xyxy_to_xywh
from models.geometry.rle import rle_decode, rle_encode
from models.instances import Instances
from pipelines.data.loading.augment import Augmentation
from pipelines.data.loading.batches import DetectorBatches, SegmenterBatches
from pipelines.data.loading.tiles import TileSettings, cut_tiles
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.inference import evaluate_predictions
from pipelines.evaluation.matching import diagnose, rank
from pipelines.evaluation.metrics import evaluate_instances, evaluate_masks
from pipelines.evaluation.sample_images import _crops
from pipelines.evaluation.side_by_side import Measurement, all_metrics
from pipelines.registry.gates import Gates, judge
from scoring.comparison.compare import Candidate, compare
from tests.conftest import write_image

PLAIN = Augmentation(mirror=False, quarter_turns=False)


def _box(i):
    return [8 + 30 * i, 10, 20, 16]


def _outline(i):
    x, y, w, h = _box(i)
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _write(folder, spoilt=(), crowd=(), planes=4, split="test"):
    """Two images of four planes each; the outlines of some are unusable, some are crowds."""
    images, annotations = [], []
    for image in range(2):
        write_image(folder / split / f"{image}.png", 60, 140, image)
        images.append({"id": image, "file_name": f"{image}.png", "height": 60, "width": 140})
        for i in range(planes):
            number = image * planes + i
            segmentation = [[1, 2]] if number in spoilt else _outline(i)
            entry = {"id": number, "image_id": image, "category_id": 1, "bbox": _box(i), "segmentation": segmentation}
            annotations.append({**entry, "iscrowd": int(number in crowd)})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "plane"}]}
    (folder / f"{split}_coco.json").write_text(json.dumps(content))
    return open_dataset(folder, split)


def _perfect(dataset, masks=None):
    """What finds every plane, outlines too (of a plane without one: its box)."""
    return [
        Instances.make(
            s.image_id, s.height, s.width, s.boxes, np.linspace(0.9, 0.6, len(s.boxes)), masks=masks or s.for_masks().masks
        )
        for s in dataset.samples
    ]


def test_one_unusable_outline_leaves_the_others_in(tmp_path):
    dataset = _write(tmp_path, spoilt={1})
    assert dataset.has_masks
    assert "8 planes (1 of them without an outline: left out for masks)" in dataset.summary()
    predictions = _perfect(dataset)
    boxes, masks = (evaluate_instances(dataset, predictions, kind) for kind in ("bbox", "segm"))
    assert (boxes.metrics["AP"], masks.metrics["AP"]) == (1.0, 1.0)
    assert (masks.settings["planes"], masks.settings["ignored"], masks.settings["digest"]) == (8, 1, dataset.digest())
    # A mask there is neither right nor wrong, a plane missed there is no miss; elsewhere both count.
    missing = [predictions[0].take(np.array([0, 2, 3])), predictions[1]]
    assert evaluate_instances(dataset, missing, "segm").metrics["AP"] == 1.0
    assert evaluate_instances(dataset, missing).metrics["AP"] < 1.0
    fewer = [predictions[0].take(np.array([0, 1, 3])), predictions[1]]
    assert evaluate_instances(dataset, fewer, "segm").metrics["AP"] < 0.9
    assert [p for p, _ in evaluate_predictions(predictions, dataset, False)] == ["", "mask_"]


def test_the_numbers_are_pycocotools_own(tmp_path):
    """Against COCOeval given the plane without an outline as a crowd in its box, on shifted masks."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset = _write(tmp_path, spoilt={1, 6})
    predictions = []
    for s, t in zip(dataset.samples, dataset.for_masks().samples, strict=True):
        masks = [rle_encode(np.roll(rle_decode(m), i, axis=1)) for i, m in enumerate(t.masks)]
        predictions.append(Instances.make(s.image_id, 60, 140, s.boxes, [0.9, 0.8, 0.7, 0.6], masks=masks))
    truth = dataset.for_masks().to_coco()
    assert sum(a["iscrowd"] for a in truth["annotations"]) == 2
    for entry in truth["annotations"]:
        if entry["iscrowd"]:
            assert coco_mask.toBbox(entry["segmentation"]).tolist() == entry["bbox"]
    reference = COCO()
    reference.dataset = truth
    reference.createIndex()
    results = [
        {"image_id": n, "category_id": 1, "score": float(f.scores[i]), "segmentation": f.masks[i]}
        for n, f in enumerate(predictions, start=1)
        for i in range(len(f))
    ]
    evaluator = COCOeval(reference, reference.loadRes(results), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    ours = evaluate_instances(dataset, predictions, "segm").metrics
    assert ours["AP"] == pytest.approx(evaluator.stats[0], abs=1e-9)
    assert float(rank(dataset, predictions, "segm").curve(np.ones(2)).mean()) == pytest.approx(evaluator.stats[0], abs=1e-6)


def test_errors_of_outlines_are_not_looked_for_where_none_is_known(tmp_path):
    dataset = _write(tmp_path, spoilt={1})
    nowhere = rle_encode(np.pad(np.ones((2, 2), bool), ((58, 0), (138, 0))))
    predictions = _perfect(dataset)[0]
    odd = replace(predictions, masks=(predictions.masks[0], nowhere, *predictions.masks[2:]))
    counts = diagnose(dataset.samples[0], odd, True).counts()
    assert (counts["correct"], counts["missed"], counts["poorly outlined"]) == (3, 0, 0)
    comparison = compare(dataset, [Candidate("a", _perfect(dataset)), Candidate("b", _perfect(dataset))])
    assert comparison.kinds == ["bbox", "segm"]
    assert comparison.errors["a"]["correct"] == 7


def test_segmenters_learn_and_are_judged_by_what_has_outlines(tmp_path):
    dataset = _write(tmp_path, spoilt={1, 2, 5})
    batches = SegmenterBatches(
        dataset, PLAIN, SegmenterArchitecture(network="skipnet", crop_size=64), batch_size=8, box_jitter=0.0, seed=0
    )
    assert len(batches._planes) == 5
    crops, masks = batches[0]
    assert len(crops) == 8
    assert (masks.reshape(8, -1).max(axis=1) == 1).all()
    guesses = [list(f.masks) for f in _perfect(dataset)]
    evaluation = evaluate_masks(dataset, guesses)
    assert evaluation.metrics["IoU"] == 1.0
    assert evaluation.settings["planes"] == 5
    sheet = _crops([(s.read(), s, f) for s, f in zip(dataset.samples, _perfect(dataset), strict=True)])
    assert sheet.size


def test_mask_heads_get_no_target_without_an_outline(tmp_path):
    dataset = _write(tmp_path, spoilt={1}, crowd={7})
    masks, boxes = (
        DetectorBatches(dataset, PLAIN, batch_size=2, window=None, focus=0.8, min_visible=0.3, seed=0, masks=m)[0]
        for m in (True, False)
    )
    assert sorted(len(e.boxes) for e in masks) == [3, 3]
    assert sorted(len(e.boxes) for e in boxes) == [3, 4]
    assert all(len(e.masks) == len(e.boxes) for e in masks)
    # What is no target is not shown as background either, and its neighbours stay as they are.
    for example in masks:
        plain = next(b for b in boxes if np.mean(b.image == example.image) > 0.5)
        changed = (plain.image != example.image).any(axis=2)
        if len(plain.boxes) == 4:
            x, y, w, h = _box(1)
            assert changed[y : y + h, x : x + w].mean() > 0.9
            changed[y : y + h, x : x + w] = False
        assert not changed.any()
    tiles = cut_tiles(dataset, TileSettings(size=64, overlap=0.5), 0.3)
    assert tiles.has_masks
    assert tiles.without_outline > 0
    DetectorBatches(tiles, PLAIN, batch_size=2, window=None, focus=0.8, min_visible=0.3, seed=0, masks=True)[0]


def test_a_set_without_any_outline_has_no_masks(tmp_path):
    dataset = _write(tmp_path, spoilt=set(range(8)))
    assert not dataset.has_masks
    assert "outline:" not in dataset.summary()
    assert dataset.for_masks() is dataset
    assert [p for p, _ in evaluate_predictions(_perfect(dataset), dataset, False)] == [""]


def test_an_outline_far_from_its_box_is_dropped_and_the_box_kept(tmp_path):
    dataset = _write(tmp_path)
    content = json.loads((tmp_path / "test_coco.json").read_text())
    content["annotations"][2]["segmentation"] = _outline(0)
    (tmp_path / "test_coco.json").write_text(json.dumps(content))
    dataset = open_dataset(tmp_path, "test")
    assert "1 outlines far from their box dropped (first: test_coco.json annotation 2)" in dataset.summary()
    assert xyxy_to_xywh(dataset.samples[0].boxes)[2].tolist() == _box(2)
    assert dataset.samples[0].masks[2] is None
    SegmenterBatches(
        dataset, Augmentation(rotation=45), SegmenterArchitecture(crop_size=64), batch_size=8, box_jitter=0.1, seed=0
    )[0]


def test_an_outline_beside_the_crop_is_no_traceback(tmp_path):
    """A long thin outline whose box overlaps, but not one pixel of it lies in the crop's surroundings."""
    dataset = _write(tmp_path)
    sample = dataset.samples[0]
    corner = np.zeros((60, 140), bool)
    corner[59, 139] = True
    spoilt = replace(sample, masks=(rle_encode(corner), *sample.masks[1:]))
    batches = SegmenterBatches(
        replace(dataset, samples=(spoilt,)),
        Augmentation(rotation=45),
        SegmenterArchitecture(crop_size=64),
        batch_size=8,
        box_jitter=0.1,
        seed=0,
    )
    assert np.isfinite(batches[0][1]).all()


@pytest.mark.parametrize("segmenter", [True, False])
def test_truth_of_crowds_alone_is_nan_and_no_error(segmenter, tmp_path):
    dataset = _write(tmp_path, crowd=set(range(8)))
    assert (dataset.planes, dataset.has_masks) == (0, True)
    predictions = _perfect(dataset)
    metrics = all_metrics(predictions, dataset, segmenter)
    assert np.isnan(metrics["IoU" if segmenter else "AP"])
    checks = judge(
        Gates(metrics={"IoU" if segmenter else "AP": {"minimum": 0.1}}),
        "IoU" if segmenter else "AP",
        Measurement(dataset, segmenter, predictions, [1.0, 1.0], metrics),
        None,
    )
    assert [(c.passed, c.candidate) for c in checks] == [(False, "cannot be measured")]


def test_slices_of_masks_on_data_without_outlines_are_judged_by_boxes(tmp_path):
    dataset = _write(tmp_path, spoilt=set(range(8)))
    predictions = _perfect(dataset)
    one = Measurement(dataset, False, predictions, [1.0, 1.0], all_metrics(predictions, dataset, False))
    gates = Gates(slices={"first": {"images": "0"}, "small ones": {"size": "small"}}, metrics={"mask_AP": {"minimum": 0.1}})
    checks = {c.gate: c for c in judge(gates, "mask_AP", one, one)}
    assert checks["first: AP"].passed
    assert checks["small ones: AP"].passed
    assert (checks["mask_AP"].passed, checks["mask_AP"].candidate) == (False, "cannot be measured")


def test_a_course_file_name_may_have_a_folder(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "train" / name, 60, 140)
    entry = {"file_name": "train/a.png", "category_name": "plane", "bbox": _box(0), "segmentation": _outline(0), "id": 1}
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    dataset = open_dataset(tmp_path, "train")
    assert [(s.image_id, len(s.boxes)) for s in dataset.samples] == [("a", 1), ("b", 0)]
