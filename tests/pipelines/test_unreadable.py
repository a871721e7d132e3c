"""Annotated images that cannot be read: found when a set is opened, or left out while training, which goes on."""

from __future__ import annotations

import json
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from models.errors import DataError
from models.images.decoding import image_header
from models.instances import Instances
from pipelines.data.dataset import Dataset
from pipelines.data.loading.augment import Augmentation
from pipelines.data.loading.batches import DetectorBatches, SegmenterBatches, epoch_items
from pipelines.data.loading.cache import ImageCache
from pipelines.data.loading.tiles import TileSettings, cached_tiles, cut_tiles
from pipelines.data.loading.unreadable import UNREADABLE_FILE, Unreadable
from pipelines.data.readers.opening import open_dataset
from pipelines.training.inputs import Inputs, find_earlier, write_inputs
from pipelines.training.loop import step_loader

SIDE = 64


def _set(folder, count=6, suffix="png", course=False):
    """Images of one plane each, all annotated, each gray of its own."""
    (folder / "train").mkdir(parents=True)
    images, annotations, entries = [], [], []
    for i in range(count):
        name = f"s{i}.{suffix}"
        noise = np.random.default_rng(i).integers(0, 5, (SIDE, SIDE, 3))
        Image.fromarray((noise + 20 * (i + 1)).astype(np.uint8)).save(folder / "train" / name)
        outline = {"bbox": [10, 10, 20, 20], "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]], "id": i + 1}
        images.append({"id": i + 1, "file_name": name, "height": SIDE, "width": SIDE})
        annotations.append({**outline, "image_id": i + 1, "category_id": 1})
        entries.append({**outline, "file_name": name, "category_name": "plane"})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "plane"}]}
    (folder / f"train{'' if course else '_coco'}.json").write_text(json.dumps(entries if course else content))
    return folder


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 95 // 100])


def _end_early(path):
    """A PNG that lacks its last rows; its orientation stands before them, so that nothing but decoding tells."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    data = zlib.compress((b"\0" + b"\x50" * SIDE * 3) * (SIDE // 2))
    exif = Image.Exif()
    exif[0x0112] = 1
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"eXIf", exif.tobytes()[6:])
    path.write_bytes(start + chunk(b"IDAT", data) + chunk(b"IEND", b""))


PLAIN = Augmentation(mirror=False, quarter_turns=False)


def _batches(dataset, unreadable=None):
    return DetectorBatches(
        dataset,
        PLAIN,
        batch_size=3,
        window=None,
        focus=0.5,
        min_visible=0.3,
        seed=7,
        **({"unreadable": unreadable} if unreadable else {}),
    )


def _grays(batch):
    """Which images a batch holds."""
    return [round(float(np.median(example.image)) / 20) - 1 for example in batch]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
@pytest.mark.parametrize("course", [False, True])
def test_a_cut_file_is_found_when_the_set_is_opened(tmp_path, suffix, course):
    folder = _set(tmp_path / "a", suffix=suffix, course=course)
    assert open_dataset(folder, "train").problems.summary() == ""
    _cut(folder / "train" / f"s2.{suffix}")
    left = open_dataset(folder, "train")
    assert len(left) == 5
    assert "1 unreadable images left out (first: " in left.summary()
    digest = left.digest()
    (folder / "train" / f"s2.{suffix}").unlink()
    assert open_dataset(folder, "train").digest() == digest


def test_a_png_that_lacks_its_last_rows_is_found_when_the_set_is_opened(tmp_path):
    folder = _set(tmp_path / "a")
    content = (folder / "train" / "s1.png").read_bytes()
    head, data = content[:33], zlib.compress((b"\0" + b"\x50" * SIDE * 3) * (SIDE // 2))
    chunk = b"IDAT" + data
    body = struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "train" / "s1.png").write_bytes(head + body + content[-12:])
    assert "1 unreadable images left out (first: train_coco.json image s1.png" in open_dataset(folder, "train").summary()


def test_a_whole_file_with_a_tail_is_not_lost(tmp_path):
    folder = _set(tmp_path / "a", suffix="jpg")
    path = folder / "train" / "s1.jpg"
    # Its end is further from the end of the file than is looked at: only decoding it tells that it is whole.
    path.write_bytes(path.read_bytes() + bytes(200_000))
    assert image_header(path).cut
    assert len(open_dataset(folder, "train")) == 6


def _hole(path):
    """A TIFF with a hole in its strips."""
    with Image.open(path) as image:
        image.save(path, "TIFF", compression="tiff_adobe_deflate")
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_end_early, _hole])
def test_what_shows_only_while_decoding_ends_no_training(tmp_path, damage):
    damage(_set(tmp_path / "a") / "train" / "s2.png")
    assert len(open_dataset(tmp_path / "a", "train")) == 6
    batches = _batches(open_dataset(tmp_path / "a", "train"))
    seen = [example for step in range(10) for example in batches[step]]
    assert set(_grays(seen)) == {0, 1, 3, 4, 5}
    assert min(example.image.min() for example in seen) >= 20


def test_an_unreadable_image_moves_no_other_one_and_is_said_once(tmp_path, caplog):
    whole = open_dataset(_set(tmp_path / "a"), "train")
    expected = [epoch_items(7, step, 3, 6) for step in range(10)]
    assert [_grays(_batches(whole)[step]) for step in range(10)] == expected
    _end_early(tmp_path / "a" / "train" / "s2.png")
    data = open_dataset(tmp_path / "a", "train")
    assert len(data) == 6
    unreadable = Unreadable(tmp_path / "t")
    batches = _batches(data, unreadable)
    with caplog.at_level(logging.WARNING):
        seen = [_grays(batches[step]) for step in range(10)]
    assert seen == [[3 if image == 2 else image for image in batch] for batch in expected]
    assert [r.message for r in caplog.records] == [f"{m}; left out of the training" for m in unreadable.messages().values()]
    assert list(unreadable.messages()) == [str(tmp_path / "a" / "train" / "s2.png")]
    # A resumed run, which knows from the start, and one that knows nothing see the same.
    for known in (Unreadable(tmp_path / "t"), Unreadable()):
        assert _grays(_batches(data, known)[7]) == seen[7]


def test_crops_of_an_unreadable_image_are_replaced(tmp_path):
    from models.engines.unet.settings import SegmenterArchitecture

    folder = _set(tmp_path / "a")
    _end_early(folder / "train" / "s5.png")
    architecture = SegmenterArchitecture.model_construct(crop_size=32, margin=0.1)
    batches = SegmenterBatches(open_dataset(folder, "train"), PLAIN, architecture, batch_size=6, box_jitter=0.0, seed=3)
    crops, masks = batches[0]
    grays = sorted(round(float(np.median(crop)) / 20) - 1 for crop in crops)
    assert grays == [0, 0, 1, 2, 3, 4]
    assert (masks.max(axis=(1, 2)) == 1).all()


def test_workers_tell_each_other_and_the_process_that_started_them(tmp_path):
    folder = _set(tmp_path / "a")
    for i in (1, 4):
        _end_early(folder / "train" / f"s{i}.png")
    unreadable = Unreadable(tmp_path / "t")
    batches = _batches(open_dataset(folder, "train"), unreadable)
    alone = [_grays(_batches(open_dataset(folder, "train"))[step]) for step in range(6)]
    assert [_grays(batch) for batch in step_loader(batches, 0, 6, 2)] == alone
    assert sorted(path[-6:] for path in unreadable.messages()) == ["s1.png", "s4.png"]


def test_a_line_that_a_kill_cut_is_passed_over(tmp_path):
    data = open_dataset(_set(tmp_path / "a"), "train")
    Unreadable(tmp_path).add(data.samples[0], DataError("bad"))
    with open(tmp_path / UNREADABLE_FILE, "ab") as handle:
        handle.write(b'["/x/s1.png", "", "cu')
    Unreadable(tmp_path).add(data.samples[2], MemoryError("much"))
    assert [path[-6:] for path in Unreadable(tmp_path).messages()] == ["s0.png", "s2.png"]


def test_no_readable_image_at_all_is_an_error(tmp_path):
    folder = _set(tmp_path / "a", count=2)
    for i in range(2):
        _end_early(folder / "train" / f"s{i}.png")
    with pytest.raises(DataError, match=r"none of the training images can be read; the first: .*\.png"):
        _batches(open_dataset(folder, "train"))[0]


def test_tiles_of_an_unreadable_image_are_left_out_of_the_cache_and_replaced(tmp_path, caplog):
    folder = _set(tmp_path / "a")
    _end_early(folder / "train" / "s0.png")
    unreadable = Unreadable(tmp_path / "t")
    tiles = cut_tiles(open_dataset(folder, "train"), TileSettings(size=48, overlap=0.5, empty=1.0), 0.3)
    for _ in range(2):
        cached = cached_tiles(tiles, tmp_path / "tiles", lambda samples, *_: samples, unreadable)
        assert len(cached) == len(tiles)
        assert {s.scene for s in cached.samples if s.window is not None} == {"s0"}
        assert len(unreadable.messages()) == 1
    batches = _batches(cached, unreadable)
    assert 0 not in {gray for step in range(20) for gray in _grays(batches[step])}
    # Said once for the file, not for each of its tiles.
    assert sum(s.scene == "s0" for s in tiles.samples) > 1
    assert len([r for r in caplog.records if "s0.png" in r.message]) == 1


def test_a_damaged_tile_leaves_the_others_of_its_file(tmp_path):
    data = open_dataset(_set(tmp_path / "a"), "train")
    tiles = cut_tiles(data, TileSettings(size=48, overlap=0.5, empty=1.0), 0.3).samples
    first, second = [s for s in tiles if s.scene == "s0"][:2]
    unreadable = Unreadable(tmp_path / "t")
    unreadable.add(first, DataError("bad"))
    for known in (unreadable, Unreadable(tmp_path / "t")):
        assert first in known
        assert second not in known
        assert data.samples[0] not in known


def _inputs(dataset: Dataset, settings="r"):
    return Inputs.of(settings, dataset.subset([f"s{i}" for i in range(4)], "train"), dataset.subset(["s4", "s5"], "val"))


def test_a_training_whose_unreadable_images_were_removed_goes_on(tmp_path):
    folder = _set(tmp_path / "a")
    _end_early(folder / "train" / "s1.png")
    data = open_dataset(folder, "train")
    begun = tmp_path / "work" / "planes-det-0123456789ab"
    begun.mkdir(parents=True)
    write_inputs(begun, _inputs(data))
    (folder / "train" / "s1.png").unlink()
    fewer = open_dataset(folder, "train")
    # Not known yet to be unreadable: another training.
    assert find_earlier(begun.parent, "planes-det", _inputs(fewer)) is None
    Unreadable(begun).add(data.samples[1], DataError("bad"))
    earlier = find_earlier(begun.parent, "planes-det", _inputs(fewer))
    assert (earlier.folder, earlier.train, earlier.val, earlier.removed) == (
        begun,
        ("s0", "s1", "s2", "s3"),
        ("s4", "s5"),
        1,
    )
    # Another name, other settings, another image gone, another image there.
    assert find_earlier(begun.parent, "planes", _inputs(fewer)) is None
    assert find_earlier(begun.parent, "planes-det", _inputs(fewer, "other")) is None
    assert find_earlier(begun.parent, "planes-det", _inputs(fewer.subset(["s0", "s2", "s4", "s5"], ""))) is None
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(folder / "train" / "s0.png")
    assert find_earlier(begun.parent, "planes-det", _inputs(open_dataset(folder, "train"))) is None


class _Blind:
    """Takes any image but one that is 2 pixels wide."""

    def predict(self, images):
        if images[0].shape[1] == 2:
            raise MemoryError("out of memory")
        return [Instances.make("0", *image.shape[:2], [[10, 10, 30, 30]], [0.9]) for image in images]


def test_a_validation_counts_what_fails_and_says_it_once(tmp_path, caplog):
    from pipelines.training.detector import validation_metrics

    folder = _set(tmp_path / "a")
    _end_early(folder / "train" / "s1.png")
    val, unreadable = open_dataset(folder, "train"), Unreadable(tmp_path / "t")
    with caplog.at_level(logging.WARNING):
        metrics = [validation_metrics(_Blind(), val, masks=False, unreadable=unreadable) for _ in range(2)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["images_failed"] == 1
    assert metrics[0]["AP50"] == pytest.approx(5 / 6, abs=0.01)
    assert [r.message.endswith("; counts as an image without detections") for r in caplog.records] == [True]
    assert "images_failed" not in validation_metrics(
        _Blind(), val.subset(["s0", "s2"], "val"), masks=False, unreadable=unreadable
    )


def test_a_model_that_takes_no_image_at_all_is_an_error(tmp_path):
    from pipelines.evaluation.inference import predict_dataset

    folder = _set(tmp_path / "a", count=2)
    for i in range(2):
        Image.fromarray(np.zeros((64, 2, 3), np.uint8)).save(folder / "train" / f"s{i}.png")
    with pytest.raises(
        DataError, match=r"/all: none of its 2 images could be predicted; the first: .*s0\.png: MemoryError"
    ):
        predict_dataset(_Blind(), open_dataset(folder / "train"))


def test_a_sheet_and_an_example_are_made_of_what_can_be_read(tmp_path, monkeypatch):
    from pipelines.evaluation import sample_images
    from pipelines.use_cases.publishing import example_image

    folder = _set(tmp_path / "a", count=3)
    _end_early(folder / "train" / "s0.png")
    data = open_dataset(folder, "train")
    monkeypatch.setattr(sample_images, "load_model", lambda *_: _Blind())
    monkeypatch.setattr(sample_images, "read_spec", lambda _: type("Spec", (), {"rendering": data.rendering}))
    evaluations, sheet, *_ = sample_images.evaluate_with_sheet(tmp_path, data, "cpu")
    assert evaluations[0][1].metrics["images_failed"] == 1
    assert [p for p, e in evaluations if "images_failed" in e.metrics] == [""]
    assert sheet.shape[0] > 600
    assert 38 <= example_image("detector", data).min() <= 48


def test_without_planes_a_detector_still_has_an_example_and_a_segmenter_has_none(tmp_path):
    from pipelines.use_cases.publishing import example_image

    folder = _set(tmp_path / "a", count=3)
    _end_early(folder / "train" / "s0.png")
    path = folder / "train_coco.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    data = open_dataset(folder, "train")
    assert example_image("detector", data).tolist() == data.samples[1].read().tolist()
    with pytest.raises(DataError, match="train: no image with a plane can be read; an example of the input"):
        example_image("segmenter", data)


def test_the_plan_of_a_training_stays_the_same_when_its_unreadable_image_is_removed(tmp_path, caplog):
    from pipelines.use_cases.requests import TrainingRequest
    from pipelines.use_cases.training import plan_training

    folder = _set(tmp_path / "a", count=12)
    request = TrainingRequest(
        task="unet",
        recipe="unet_scratch",
        data=str(folder),
        register_as="m",
        device="cpu",
        overrides=("data.val_fraction=0.3",),
        work_dir=str(tmp_path / "work"),
    )
    plan = plan_training(request)
    plan.folder.mkdir(parents=True)
    write_inputs(plan.folder, plan.inputs)
    bad = plan.data.train.samples[0]
    Unreadable(plan.folder).add(bad, DataError("bad"))
    bad.path.unlink()
    with caplog.at_level("INFO"):
        again = plan_training(request)
    assert (again.key, again.folder) == (plan.key, plan.folder)
    assert "begun with 1 more images, which cannot be read" in caplog.text
    assert [s.image_id for s in again.data.train.samples] == [s.image_id for s in plan.data.train.samples[1:]]
    assert [s.image_id for s in again.data.val.samples] == [s.image_id for s in plan.data.val.samples]
    plan.data.train.samples[3].path.unlink()
    assert plan_training(request).folder != plan.folder


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError(), None])
def test_a_disk_that_is_away_stops_a_training_and_condemns_no_image(tmp_path, monkeypatch, error):
    data = open_dataset(_set(tmp_path / "a"), "train")
    if error is None:
        (tmp_path / "a" / "train" / "s2.png").rename(tmp_path / "away.png")
    else:

        def failing(*_):
            raise error

        monkeypatch.setattr(ImageCache, "read", failing)
    batches = _batches(data, Unreadable(tmp_path / "t"))
    with pytest.raises(DataError, match=r"s\d\.png"):
        for step in range(10):
            batches[step]
    assert not (tmp_path / "t" / UNREADABLE_FILE).exists()
