"""A job brought up to date: `score --update`."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from models.errors import DataError, OutputError
from models.geometry.rle import rle_encode
from models.images import decoding
from models.instances import Instances
from models.saved.scores import Scores
from pipelines.data.readers.opening import open_dataset
from scoring.jobs import export as export_module
from scoring.jobs import manifest
from scoring.jobs import update as update_module
from scoring.jobs.export import export_job
from scoring.jobs.job import run_job
from scoring.jobs.manifest import GONE, LOCK, LOGGED, STAGING, read_manifest
from scoring.requests import JobSettings
from scoring.runners.local import LocalRunner
from scoring.writers import layer
from tests.conftest import write_image
from tests.scoring.test_again import FlakyStore, Remote

TABLES = ("instances.parquet", "errors.parquet", "coco_results.json", "kaggle.csv")


class Dots:
    """None to three planes with masks per image, made of its first pixels; notes the images' brightness."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[float] = []
        self.stop_after = stop_after

    def predict(self, images):
        results = []
        for image in images:
            if len(self.seen) == self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(float(image.mean()))
            height, width = image.shape[:2]
            number = int(image[0, 0, 0]) % 4
            boxes = [[i, i, i + 5, i + 6] for i in range(number)]
            masks = []
            for x1, y1, x2, y2 in boxes:
                mask = np.zeros((height, width), bool)
                mask[y1:y2, x1:x2] = True
                masks.append(rle_encode(mask))
            scores = [float(image[0, i, 1]) / 255 for i in range(number)]
            results.append(Instances.make("", height, width, boxes, scores, masks=masks))
        return results


@pytest.fixture
def images(tmp_path):
    """Eleven small images and one that is none."""
    folder = tmp_path / "in"
    for i in range(11):
        write_image(folder / f"i{i:02}.png", 20 + i, 30, i)
    (folder / "i05b.png").write_bytes(b"no image")
    return folder


def _run(out, data, predictor=None, *, update=True, **more):
    dataset = data if hasattr(data, "samples") else open_dataset(data)
    settings = JobSettings(**{"shard_size": 3, "overlays": 2, "score_threshold": 0.0, "update": update, **more})
    return run_job(predictor or Dots(), "m/1", dataset, out, settings=settings, progress=lambda r, *_: r)


def _change(folder: Path) -> None:
    """One image changed, one gone, one renamed, one new at the beginning, one new that is no image, one mended."""
    write_image(folder / "i02.png", 40, 44, 99)
    (folder / "i04.png").unlink()
    (folder / "i06.png").rename(folder / "z06.png")
    write_image(folder / "a.png", 25, 26, 100)
    (folder / "b.png").write_bytes(b"nothing")
    write_image(folder / "i05b.png", 22, 23, 101)


def _tables(job):
    return {name: (job.folder / name).read_bytes() for name in TABLES}


def _counts(job):
    return {k: v for k, v in job.generation.model_dump(exclude={"at", "number", "images"}).items() if v}


def test_the_tables_are_those_of_a_job_over_all_images(images, tmp_path):
    first = _run(tmp_path / "out", images, overlays=20)
    assert (first.folder / "overlays" / "i06.jpg").exists()
    _change(images)
    predictor = Dots()
    job = _run(tmp_path / "out", images, predictor)
    assert job.seconds > first.seconds
    fresh = _run(tmp_path / "fresh", images)
    assert _tables(job) == _tables(fresh)
    # The changed, the renamed, the new and the mended one; the file that is no image never came to the model.
    assert len(predictor.seen) == 4
    assert _counts(job) == {"new": 3, "changed": 2, "kept": 8, "gone": 2}
    assert (job.images, job.failures, job.instances, job.resumed) == (12, 1, fresh.instances, 8)
    assert not (job.folder / STAGING).exists()
    listed = pd.read_parquet(job.folder / "inputs.parquet").set_index("image_id")
    assert set(listed.index[listed["generation"] == 2]) == {"a", "b", "i02", "i05b", "z06"}
    done = json.loads((job.folder / "done.json").read_text())
    assert done["images"] == 12
    assert export_job(job.folder, tmp_path / "more", {"coco", "kaggle"}) == fresh.instances
    assert (tmp_path / "more" / "kaggle.csv").read_bytes() == (fresh.folder / "kaggle.csv").read_bytes()
    assert not {"i04.jpg", "i06.jpg"} & {p.name for p in (job.folder / "overlays").iterdir()}


def test_one_new_image_is_the_only_one_that_is_predicted(images, tmp_path):
    first = _run(tmp_path / "out", images)
    before = pq.read_table(first.folder / "instances.parquet").to_pylist()
    write_image(images / "n.png", 25, 26, 7)
    predictor = Dots()
    job = _run(tmp_path / "out", images, predictor)
    assert len(predictor.seen) == 1
    after = pq.read_table(job.folder / "instances.parquet").to_pylist()
    assert [row for row in after if row["image_id"] != "n"] == before
    assert [g.number for g in read_manifest(job.folder).generations] == [1, 2]


def test_nothing_new_predicts_nothing_and_writes_no_generation(images, tmp_path):
    job = _run(tmp_path / "out", images)
    before = {p: p.stat().st_mtime_ns for p in job.folder.rglob("*.parquet")}
    predictor = Dots()
    again = _run(tmp_path / "out", images, predictor)
    assert (predictor.seen, again.resumed, again.generation) == ([], 12, None)
    assert before == {p: p.stat().st_mtime_ns for p in job.folder.rglob("*.parquet")}


def test_what_is_gone_is_kept_and_comes_back_with_its_image(images, tmp_path):
    job = _run(tmp_path / "out", images)
    rows = pq.read_table(job.folder / "instances.parquet").to_pandas()
    away = tmp_path / "away"
    away.mkdir()
    for name in ("i01.png", "i03.png", "i05b.png", "i09.png"):
        shutil.move(images / name, away / name)
    job = _run(tmp_path / "out", images)
    # The file that is no image has no result to keep.
    assert _counts(job) == {"kept": 8, "gone": 3}
    gone = pq.read_table(job.folder / GONE / "instances.parquet").to_pandas()
    pd.testing.assert_frame_equal(gone, rows[rows["image_id"].isin(["i01", "i03", "i09"])].reset_index(drop=True))
    assert list(pd.read_parquet(job.folder / GONE / "inputs.parquet")["gone_in"]) == [2, 2, 2]
    # One comes back as it was, one as another image; one stays away.
    shutil.move(away / "i01.png", images / "i01.png")
    write_image(images / "i03.png", 31, 33, 55)
    predictor = Dots()
    job = _run(tmp_path / "out", images, predictor)
    assert _counts(job) == {"kept": 8, "returned": 1, "new": 1}
    assert len(predictor.seen) == 1
    assert list(pd.read_parquet(job.folder / GONE / "inputs.parquet")["image_id"]) == ["i09"]
    assert _tables(job) == _tables(_run(tmp_path / "fresh", images))
    shutil.move(away / "i09.png", images / "i09.png")
    predictor = Dots()
    job = _run(tmp_path / "out", images, predictor)
    assert (predictor.seen, _counts(job)) == ([], {"kept": 10, "returned": 1})
    assert pq.read_table(job.folder / GONE / "instances.parquet").num_rows == 0
    assert _tables(job) == _tables(_run(tmp_path / "fresh2", images))
    assert list(pd.read_parquet(job.folder / "inputs.parquet").set_index("image_id")["generation"])[:4] == [1, 1, 1, 3]


def test_all_images_may_be_others(images, tmp_path):
    _run(tmp_path / "out", images)
    for path in images.iterdir():
        path.unlink()
    write_image(images / "only.png", 25, 26, 3)
    job = _run(tmp_path / "out", images)
    assert _counts(job) == {"new": 1, "gone": 11}
    assert _tables(job) == _tables(_run(tmp_path / "fresh", images))


def test_a_name_that_a_second_file_shares_keeps_its_rows_under_the_longer_name(tmp_path):
    for i in range(4):
        write_image(tmp_path / "in" / "a" / f"{i}.png", 20 + i, 30, i)
    table = tmp_path / "list.csv"
    paths = [f"in/a/{i}.png" for i in range(4)]
    table.write_text("\n".join(["path", *paths]))
    _run(tmp_path / "out", table)
    write_image(tmp_path / "in" / "b" / "1.png", 50, 51, 9)
    table.write_text("\n".join(["path", *reversed(paths), "in/b/1.png"]))
    predictor = Dots()
    job = _run(tmp_path / "out", table, predictor)
    assert len(predictor.seen) == 1
    assert _counts(job) == {"kept": 4, "new": 1}
    assert _tables(job) == _tables(_run(tmp_path / "fresh", table))


def test_a_first_scoring_that_was_never_finished_is_no_generation(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images, Dots(stop_after=7), update=False)
    _change(images)
    predictor = Dots()
    job = _run(tmp_path / "out", images, predictor)
    assert 0 < len(predictor.seen) < 12
    assert [g.number for g in read_manifest(job.folder).generations] == [1]
    assert _tables(job) == _tables(_run(tmp_path / "fresh", images))


@pytest.mark.parametrize("again", [False, True])
def test_an_update_that_was_stopped_is_gone_on_with_even_if_the_list_changed(images, tmp_path, again):
    _run(tmp_path / "out", images)
    for i in range(9):
        write_image(images / f"n{i}.png", 25, 26, 200 + i)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images, Dots(stop_after=7))
    # The earlier generation is what others see.
    assert len(read_manifest(tmp_path / "out" / "m-1").generations) == 0
    assert export_job(tmp_path / "out" / "m-1", tmp_path / "more", {"coco"})
    if again:
        _change(images)
        (images / "n0.png").unlink()
    predictor = Dots()
    job = _run(tmp_path / "out", images, predictor)
    # Two shards of three images were on disk.
    assert len(predictor.seen) == (7 if again else 3)
    assert _tables(job) == _tables(_run(tmp_path / "fresh", images))
    assert sum(_counts(job)[k] for k in ("kept", "new")) + (2 if again else 0) == job.images + job.failures


def test_a_stop_at_any_change_of_a_file_leaves_one_generation_or_the_other(images, tmp_path, monkeypatch):
    """Every rename, replacement and removal fails once, each in a run of its own, as after kill -9."""
    first = _run(tmp_path / "first", images)
    _change(images)
    expected = _tables(_run(tmp_path / "fresh", images))
    real = {"replace": os.replace, "rename": os.rename, "unlink": os.unlink}
    for stop in count():
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "first", out)
        changes = []

        def one(name, changes=changes, stop=stop):
            def change(*arguments, **options):
                if len(changes) >= stop:
                    raise KeyboardInterrupt
                changes.append(name)
                return real[name](*arguments, **options)

            return change

        for name in real:
            monkeypatch.setattr(os, name, one(name))
        try:
            _run(out, images)
            finished = True
        except KeyboardInterrupt:
            finished = False
        monkeypatch.undo()
        folder = out / "m-1"
        number = len(read_manifest(folder).generations)
        rows = pq.read_table(folder / "instances.parquet").num_rows
        assert (number, rows) in ((0, first.instances), (2, len(json.loads(expected["coco_results.json"])))), stop
        assert export_job(folder, tmp_path / "more", {"coco"}) == rows
        assert _tables(_run(out, images)) == expected
        assert len(read_manifest(folder).generations) == 2
        if finished:
            break
    assert stop > 15


def test_a_full_disk_leaves_the_earlier_generation(images, tmp_path, monkeypatch):
    job = _run(tmp_path / "out", images)
    before = _tables(job)
    _change(images)
    real = pq.ParquetWriter.write_table

    def full(self, table, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OutputError, match="No space left on device"):
        _run(tmp_path / "out", images)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", real)
    assert _tables(job) == before
    assert _tables(_run(tmp_path / "out", images)) == _tables(_run(tmp_path / "fresh", images))


def test_random_histories_end_in_the_tables_of_a_fresh_job(tmp_path):
    """Images come, go, change and return at random, with stops in between; six nights each."""
    for history in range(4):
        chance = random.Random(history)
        folder, away, out = (tmp_path / f"{history}-{name}" for name in ("in", "away", "out"))
        away.mkdir()
        for i in range(8):
            write_image(folder / f"{i}.png", 20, 21, i)
        for night in range(6):
            for path in sorted(folder.iterdir()):
                fate = chance.random()
                if fate < 0.15 and len(list(folder.iterdir())) > 1:
                    shutil.move(path, away / path.name)
                elif fate < 0.25:
                    write_image(path, 22 + night, 23, chance.randrange(10_000))
            for path in sorted(away.iterdir()):
                if chance.random() < 0.4:
                    shutil.move(path, folder / path.name)
            for i in range(chance.randrange(4)):
                write_image(folder / f"n{night}{i}.png", 20, 24, chance.randrange(10_000))
            if chance.random() < 0.5:
                try:
                    _run(out, folder, Dots(stop_after=chance.randrange(6)))
                except KeyboardInterrupt:
                    continue
            job = _run(out, folder)
        job = _run(out, folder)
        fresh = _run(tmp_path / f"{history}-fresh", folder)
        assert _tables(job) == _tables(fresh), history
        assert (job.images, job.instances) == (fresh.images, fresh.instances)


def test_probabilities_are_those_of_a_fresh_job(images, tmp_path):
    scores = Scores(slope=0.7, intercept=0.2, threshold=0.5, detections=9, fitted_on="a test")
    _run(tmp_path / "out", images, scores=scores)
    _change(images)
    job = _run(tmp_path / "out", images, scores=scores)
    assert "probability" in pq.read_table(job.folder / "instances.parquet").column_names
    assert _tables(job) == _tables(_run(tmp_path / "fresh", images, scores=scores))


@pytest.fixture
def store(images, monkeypatch):
    """A store with the images, tried again without a pause."""
    monkeypatch.setattr(decoding, "RETRIES", (0.0,))
    (images / "i05b.png").unlink()
    return FlakyStore(images)


def _remote(store):
    local = open_dataset(store.folder)
    return replace(local, samples=tuple(replace(s, path=Remote(store, s.path)) for s in local.samples))


def test_a_store_that_does_not_answer_costs_no_row(store, tmp_path):
    _run(tmp_path / "out", _remote(store))
    write_image(store.folder / "n.png", 25, 26, 7)
    store.down = {"i03.png"}
    predictor = Dots()
    job = _run(tmp_path / "out", _remote(store), predictor)
    # Rows of an earlier time, and said to be.
    assert (len(predictor.seen), _counts(job)) == (1, {"new": 1, "kept": 11, "unreadable": 1})
    # Its mark is the earlier one, so that the same images are the same job afterwards, with or without --update.
    store.down = set()
    for update in (True, False):
        again = _run(tmp_path / "out", _remote(store), Dots(stop_after=0), update=update)
        assert (again.resumed, again.generation.number) == (12, 2)
    # Whether it has changed meanwhile is seen.
    write_image(store.folder / "i03.png", 27, 26, 8)
    assert _counts(_run(tmp_path / "out", _remote(store))) == {"changed": 1, "kept": 11}


def test_what_could_not_be_fetched_is_tried_again_once_a_night(store, tmp_path):
    store.down = {"i03.png", "i07.png"}
    assert _run(tmp_path / "out", _remote(store)).failures == 2
    write_image(store.folder / "n.png", 25, 26, 7)
    store.down = {"i07.png"}
    predictor = Dots()
    job = _run(tmp_path / "out", _remote(store), predictor)
    assert (len(predictor.seen), _counts(job)) == (2, {"new": 1, "retried": 2, "kept": 9})
    assert (job.images, job.failures) == (11, 1)
    assert pq.read_table(job.folder / "errors.parquet")["image_id"].to_pylist() == ["i07"]
    store.down = set()
    write_image(store.folder / "o.png", 25, 26, 8)
    job = _run(tmp_path / "out", _remote(store))
    assert (job.failures, _counts(job)) == (0, {"new": 1, "retried": 1, "kept": 11})
    assert job.instances == _run(tmp_path / "fresh", _remote(store)).instances


def test_a_stopped_update_tries_again_what_it_could_not_fetch(store, tmp_path):
    _run(tmp_path / "out", _remote(store))
    for i in range(9):
        write_image(store.folder / f"n{i}.png", 25, 26, 200 + i)
    store.down = {"n0.png"}
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", _remote(store), Dots(stop_after=7))
    store.down = set()
    predictor = Dots()
    job = _run(tmp_path / "out", _remote(store), predictor)
    assert (job.failures, _counts(job)) == (0, {"new": 9, "kept": 11})
    assert len(predictor.seen) < 9
    assert job.instances == _run(tmp_path / "fresh", _remote(store)).instances


def test_what_was_logged_once_is_written_and_logged_anew_when_it_returns(images, tmp_path):
    job = _run(tmp_path / "out", images)
    (job.folder / LOGGED).write_text(job.outputs)
    assert _run(tmp_path / "out", images).unchanged
    (job.folder / "metrics.json").write_text("of annotations that are no more")
    shutil.move(images / "i00.png", tmp_path / "i00.png")
    other = _run(tmp_path / "out", images)
    assert not other.unchanged
    assert not (job.folder / "metrics.json").exists()
    # Killed before it was logged; then the first image is back.
    shutil.move(tmp_path / "i00.png", images / "i00.png")
    again = _run(tmp_path / "out", images)
    assert (again.outputs, again.unchanged) == (job.outputs, False)


def test_a_file_that_a_list_names_too_early_is_scored_when_it_is_there(images, tmp_path):
    table = tmp_path / "list.csv"
    names = ["in/i00.png", "in/i01.png", "in/later.png"]
    table.write_text("\n".join(["path", *names]))
    assert _run(tmp_path / "out", table).failures == 1
    table.write_text("\n".join(["path", *names, "in/i02.png"]))
    job = _run(tmp_path / "out", table)
    assert (job.failures, _counts(job)) == (1, {"kept": 3, "new": 1})
    write_image(images / "later.png", 25, 26, 8)
    table.write_text("\n".join(["path", *names, "in/i03.png"]))
    job = _run(tmp_path / "out", table)
    assert (job.failures, _counts(job)) == (0, {"kept": 2, "retried": 1, "new": 1, "gone": 1})
    assert _tables(job)["instances.parquet"] == _tables(_run(tmp_path / "fresh", table))["instances.parquet"]


def test_other_settings_are_refused_and_other_images_name_the_option(images, tmp_path):
    _run(tmp_path / "out", images)
    write_image(images / "n.png", 25, 26, 7)
    with pytest.raises(DataError, match=r"1 images new \(first: n\); .* --out, --update to score what is new, or"):
        _run(tmp_path / "out", images, update=False)
    with pytest.raises(DataError, match=r"score_threshold 0.0, not 0.5.*; name another --out, or --fresh"):
        _run(tmp_path / "out", images, score_threshold=0.5)


def test_two_at_once_do_not_collide(images, tmp_path):
    job = _run(tmp_path / "out", images)
    write_image(images / "n.png", 25, 26, 7)
    with FileLock(job.folder / LOCK), pytest.raises(OutputError, match="another score is writing there"):
        _run(tmp_path / "out", images)
    assert _counts(_run(tmp_path / "out", images)) == {"new": 1, "kept": 12}


def test_fresh_removes_what_updates_left(images, tmp_path):
    _run(tmp_path / "out", images)
    (images / "i00.png").unlink()
    job = _run(tmp_path / "out", images)
    assert (job.folder / GONE / "inputs.parquet").exists()
    (job.folder / STAGING / "pieces" / "000001").mkdir(parents=True)
    job = _run(tmp_path / "out", images, update=False, fresh=True)
    assert not (job.folder / GONE).exists()
    assert not (job.folder / STAGING).exists()
    assert read_manifest(job.folder).generations == ()


def test_a_damaged_list_of_inputs_is_named(images, tmp_path):
    job = _run(tmp_path / "out", images)
    write_image(images / "n.png", 25, 26, 7)
    (job.folder / manifest.INPUTS).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"m-1: its tables cannot be read .*; score with --fresh"):
        _run(tmp_path / "out", images)


def test_files_of_equal_name_size_and_time_in_another_folder_are_others(tmp_path):
    for name, values in (("may", (1, 2, 3)), ("june", (3, 3, 0))):
        for i, value in enumerate(values):
            path = tmp_path / name / f"{i}.bmp"
            path.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(path), np.full((20, 24, 3), value, np.uint8))
            os.utime(path, (1e9, 1e9))
    _run(tmp_path / "out", tmp_path / "may")
    predictor = Dots()
    job = _run(tmp_path / "out", tmp_path / "june", predictor)
    assert (len(predictor.seen), _counts(job)) == (3, {"changed": 3})
    assert _tables(job) == _tables(_run(tmp_path / "fresh", tmp_path / "june"))
    # Nor is a file that is not there the one of the same name.
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(["path", "june/0.bmp", "july/1.bmp"]))
    job = _run(tmp_path / "out", listed)
    assert (job.images, job.failures) == (1, 1)


def test_an_image_that_came_late_is_noticed_when_it_changes(images, tmp_path):
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(["path", "in/i00.png", "in/late.png"]))
    _run(tmp_path / "out", listed)
    write_image(images / "late.png", 25, 26, 8)
    assert _run(tmp_path / "out", listed, update=False).failures == 0
    write_image(images / "late.png", 60, 61, 9)
    job = _run(tmp_path / "out", listed)
    assert _tables(job)["instances.parquet"] == _tables(_run(tmp_path / "fresh", listed))["instances.parquet"]
    # From then on its content is known.
    assert _run(tmp_path / "out", listed, Dots(stop_after=0)).generation.number == job.generation.number


def test_sizes_that_annotations_state_count_too(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(3)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 6], "iscrowd": 0} for i in range(3)]
    for i in range(3):
        write_image(tmp_path / "data" / "test" / f"{i}.png", 20, 30, i + 40)

    def dataset(**changes):
        listed = [{**one, **(changes if one["id"] == 1 else {})} for one in images]
        truth = {"images": listed, "annotations": boxes, "categories": [{"id": 1, "name": "plane"}]}
        (tmp_path / "data" / "test_coco.json").write_text(json.dumps(truth))
        return open_dataset(tmp_path / "data", "test", keep=True)

    first = _run(tmp_path / "out", dataset())
    wrong = _run(tmp_path / "out", dataset(height=50))
    right = _run(tmp_path / "out", dataset())
    assert (first.failures, wrong.failures, right.failures) == (0, 1, 0)
    assert wrong.metrics["AP50"] == _run(tmp_path / "fresh", dataset(height=50)).metrics["AP50"]
    assert right.metrics == first.metrics


def test_where_none_can_be_scored_the_job_stays_what_it_was(images, tmp_path):
    job = _run(tmp_path / "out", images)
    before = _tables(job)
    for path in images.iterdir():
        path.write_bytes(b"half")
    with pytest.raises(DataError, match=r"none of 12 images could be scored; .* \(what was there is kept\)"):
        _run(tmp_path / "out", images)
    assert _tables(job) == before
    assert not (job.folder / GONE).exists()


def test_what_a_stopped_update_left_under_other_settings_is_not_taken(images, tmp_path):
    _run(tmp_path / "out", images)
    folder = tmp_path / "out" / "m-1"
    for i in range(6):
        write_image(images / f"n{i}.png", 25, 26, 200 + i)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images, Dots(stop_after=4))
    left = folder / STAGING
    shutil.copytree(left, tmp_path / "left")
    for notes in (tmp_path / "left").rglob("shard.json"):
        notes.write_text(json.dumps({**json.loads(notes.read_text()), "seconds": 1000.0}))
    job = _run(tmp_path / "out", images, update=False, fresh=True, score_threshold=0.6)
    assert not left.exists()
    shutil.copytree(tmp_path / "left", left)
    (images / "i00.png").unlink()
    write_image(images / "o.png", 25, 26, 300)
    job = _run(tmp_path / "out", images, score_threshold=0.6)
    assert _tables(job) == _tables(_run(tmp_path / "fresh", images, score_threshold=0.6))
    # Nor does its time count.
    assert job.seconds < 100
    # Nor is a piece that is damaged in the way.
    (left / "pieces" / "000001").mkdir(parents=True)
    shutil.copy(tmp_path / "left" / "pieces" / "000001" / manifest.MANIFEST, left / "pieces" / "000001")
    write_image(images / "p.png", 25, 26, 301)
    assert _counts(_run(tmp_path / "out", images, score_threshold=0.6))["new"] == 1


def test_results_that_arrive_in_any_order_are_the_same(images, tmp_path):
    """As a cluster's do."""

    class Backwards(LocalRunner):
        def results(self, shards):
            yield from list(super().results(shards))[::-1]

    settings = JobSettings(shard_size=3, overlays=0, score_threshold=0.0, update=True)

    def run():
        how = {"settings": settings, "progress": lambda r, *_: r, "runner": Backwards(Dots())}
        return run_job(Dots(), "m/1", open_dataset(images), tmp_path / "out", **how)

    run()
    _change(images)
    assert _tables(run()) == _tables(_run(tmp_path / "fresh", images))


def test_staging_may_lie_behind_a_link(images, tmp_path):
    job = _run(tmp_path / "out", images)
    (tmp_path / "larger").mkdir()
    (job.folder / STAGING).symlink_to(tmp_path / "larger")
    _change(images)
    job = _run(tmp_path / "out", images)
    assert _tables(job) == _tables(_run(tmp_path / "fresh", images))
    assert not (job.folder / STAGING).is_symlink()
    assert not (job.folder / manifest.SPENT).exists()


def test_nothing_of_an_earlier_generation_stays_beside_a_new_one(images, tmp_path):
    job = _run(tmp_path / "out", images)
    for name in (manifest.UNLOGGED, *layer.FILES):
        (job.folder / name).write_text("of the first generation")
    write_image(images / "n.png", 25, 26, 7)
    _run(tmp_path / "out", images)
    assert not [name for name in (manifest.UNLOGGED, *layer.FILES) if (job.folder / name).exists()]


def test_other_output_options_write_the_outputs_anew(images, tmp_path):
    job = _run(tmp_path / "out", images)
    (job.folder / LOGGED).write_text(job.outputs)
    before = (job.folder / "kaggle.csv").read_bytes()
    other = _run(tmp_path / "out", images, rle="airbus")
    assert not other.unchanged
    assert (job.folder / "kaggle.csv").read_bytes() != before


def test_an_export_that_meets_an_update_says_so(images, tmp_path, monkeypatch):
    job = _run(tmp_path / "out", images)
    write_image(images / "0.png", 25, 26, 3)
    real = export_module.read_inputs

    def updated(*arguments):
        inputs = real(*arguments)
        _run(tmp_path / "out", images)
        return inputs

    monkeypatch.setattr(export_module, "read_inputs", updated)
    with pytest.raises(DataError, match="was updated meanwhile"):
        export_job(job.folder, tmp_path / "more", {"coco"})


def test_readers_without_rights_are_told_what_is_the_matter(images, tmp_path, monkeypatch):
    job = _run(tmp_path / "out", images)
    write_image(images / "n.png", 25, 26, 7)
    monkeypatch.setattr(update_module, "complete_update", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images)
    monkeypatch.undo()

    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(DataError, match=r"stopped half way and cannot be completed here \(Read-only file system\)"):
        read_manifest(job.folder)
    monkeypatch.undo()
    assert len(read_manifest(job.folder).generations) == 2
