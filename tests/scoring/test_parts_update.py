"""Jobs in parts brought up to date: what is new is scored, what is gone goes, and all else keeps its bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from models.errors import DataError, OutputError
from pipelines.data.readers.listing import open_listing
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.job import run_job
from scoring.jobs.manifest import LOGGED
from scoring.parts import updates
from scoring.parts.job import SCRATCH, UPDATING, LocalParts, check_any, held, planned, run_parts, working_folder
from scoring.parts.place import Place
from scoring.parts.plan import GENERATIONS, GONE, read_plan
from scoring.parts.updates import updated
from scoring.runners.local import LocalRunner
from tests.conftest import write_image
from tests.scoring.test_job import Brightness
from tests.scoring.test_parts import SETTINGS, _opened, _requested
from tests.stores import s3_server


@pytest.fixture
def images(tmp_path):
    """Sixteen images, two of which are broken."""
    for i in range(14):
        write_image(tmp_path / "in" / f"{i:02}.png", 20, 30, 3 * i)
    for name in ("04b", "11b"):
        (tmp_path / "in" / f"{name}.png").write_bytes(b"none")
    return tmp_path / "in"


def _update(place, images, predictor=None, cache=None):
    """What `score --update` does with a place; the predictor, and what it left."""
    place, predictor = Place(place) if isinstance(place, Path) else place, predictor or Brightness()

    def run(plan):
        runner = LocalRunner(predictor)
        local = LocalParts(runner, place, plan, SETTINGS, working_folder(place, SCRATCH, cache))
        return run_parts(place, plan, local, lambda r, *_: r)

    with held(place, cache):
        there = read_plan(place) is not None
        listing, requested = open_listing(images), _requested(images)
        result = run(planned(place, listing, requested, cache=cache))
        if there:
            plan = updated(place, result.plan, listing, requested, working_folder(place, UPDATING, cache))
            result = run(plan) if plan is not result.plan else result
    return predictor, result


def _sorted_rows(place):
    """Rows of the tables without the order of images: (instances, errors, inputs without generations)."""
    place = place if isinstance(place, Place) else Place(place)
    tables = []
    for name in ("instances", "errors", "inputs"):
        rows = [r for file in place.names(name) for r in pq.read_table(_opened(place, f"{name}/{file}")).to_pylist()]
        tables.append(
            sorted(({k: v for k, v in r.items() if k != "generation"} for r in rows), key=lambda r: r["image_id"])
        )
    return tables


def _whole(images, folder):
    """The same rows of a job that scores all images at once, not in parts."""
    run_job(Brightness(), "m/1", open_dataset(images), folder, settings=SETTINGS, progress=lambda r, *_: r)
    names = ("instances", "errors", "inputs")
    tables = [pq.read_table(folder / "m-1" / f"{name}.parquet", partitioning=None).to_pylist() for name in names]
    return [
        sorted(({k: v for k, v in r.items() if k != "generation"} for r in rows), key=lambda r: r["image_id"])
        for rows in tables
    ]


def _marks(result):
    return [mark for _, mark in sorted(updates.read_marks(result.place, result.plan).items())]


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _change(images):
    """Two new images, one changed, one renamed, two gone, one that is broken now and one that is not any more."""
    write_image(images / "02b.png", 20, 30, 99)
    write_image(images / "99.png", 20, 30, 98)
    write_image(images / "03.png", 21, 30, 97)
    os.rename(images / "05.png", images / "renamed.png")
    for name in ("06", "07"):
        (images / f"{name}.png").unlink()
    (images / "08.png").write_bytes(b"no image any more")
    write_image(images / "11b.png", 20, 30, 96)


def test_the_tables_are_those_of_a_job_over_all_images_of_today(images, tmp_path):
    place = tmp_path / "out"
    _update(place, images)
    before = _bytes(place)
    _change(images)
    predictor, result = _update(place, images)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")
    # New, changed, renamed and mended ones; that of the broken one fails before it is predicted.
    assert predictor.seen == 5
    news = result.plan.later[0].news
    assert (news.new, news.changed, news.gone, news.kept, news.images) == (3, 3, 3, 10, 16)
    assert (result.images, result.failures, result.resumed, result.pending) == (14, 2, 10, 6)
    # Parts that lose nothing keep their bytes; the first part has 00 to 04b without 03.
    after = _bytes(place)
    changed = {name for name in before if before[name] != after.get(name)}
    losing = {f"part-{n:06d}" for n in result.plan.later[0].losing}
    assert {Path(name).stem for name in changed if name != "summary.json"} == losing
    assert losing == {"part-000000", "part-000001", "part-000002"}
    table = pads.dataset(place / "inputs").to_table().to_pandas()
    assert set(table[table.generation == 2].image_id) == {"02b", "99", "03", "renamed", "08", "11b"}
    gone = {name: pads.dataset(place / GONE / "0002" / name).to_table().to_pandas() for name in ("inputs", "instances")}
    assert sorted(gone["inputs"].image_id) == ["05", "06", "07"]
    assert sorted(gone["instances"].image_id) == ["05", "06", "07"]


def test_where_nothing_is_new_nothing_is_written(images, tmp_path, monkeypatch):
    _update(tmp_path / "out", images)
    _change(images)
    _update(tmp_path / "out", images)
    before = _bytes(tmp_path / "out")
    monkeypatch.setattr(updates, "publish_all", None)
    monkeypatch.setattr(updates, "_amend_part", None)
    predictor, result = _update(tmp_path / "out", images)
    assert _bytes(tmp_path / "out") == before
    assert (predictor.seen, result.pending, len(result.plan.later)) == (0, 0, 1)


def test_no_plane_is_there_twice_while_an_update_is_scored(images, tmp_path):
    class Looking(Brightness):
        def predict(self, batch):
            held = [row["image_id"] for row in _sorted_rows(tmp_path / "out")[0]]
            assert not {"03", "05", "06", "07"} & set(held)
            assert len(held) == len(set(held))
            return super().predict(batch)

    _update(tmp_path / "out", images)
    _change(images)
    looking, _ = _update(tmp_path / "out", images, Looking())
    assert looking.seen == 5


def test_many_nights_end_where_one_night_does(images, tmp_path):
    place = tmp_path / "out"
    _update(place, images)
    _change(images)
    _update(place, images)
    # A part loses images a second time, a changed image changes again, one that was gone comes back.
    for name in ("00", "99"):
        (images / f"{name}.png").unlink()
    write_image(images / "03.png", 22, 30, 55)
    write_image(images / "06.png", 20, 30, 18)
    _, result = _update(place, images)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")
    assert [one.generation for one in result.plan.generations] == [1, 2, 3]
    assert [one.first for one in result.plan.generations] == [0, 3, 4]
    assert (result.images, result.failures) == (13, 2)
    # All but one go: no part of its own is needed for that.
    for path in images.iterdir():
        if path.name != "06.png":
            path.unlink()
    predictor, result = _update(place, images)
    assert predictor.seen == 0
    assert (result.images, result.failures, result.plan.later[-1].images) == (1, 0, 0)
    assert _sorted_rows(place) == _whole(images, tmp_path / "one")
    # An update without parts of its own does not shift those of the next one.
    write_image(images / "after.png", 20, 30, 77)
    predictor, result = _update(place, images)
    assert (predictor.seen, result.images, [one.first for one in result.plan.generations]) == (1, 2, [0, 3, 4, 5, 5])
    assert _sorted_rows(place) == _whole(images, tmp_path / "two")
    (images / "after.png").unlink()
    _update(place, images)
    (images / "06.png").unlink()
    with pytest.raises(DataError, match="no images there"):
        _update(place, images)
    assert [row["image_id"] for row in _sorted_rows(place)[0]] == ["06"]


@pytest.mark.parametrize("method", ["write", "publish", "create"])
def test_stopped_at_every_file_it_ends_the_same(images, tmp_path, monkeypatch, method):
    first = tmp_path / "first"
    _update(first, images)
    _change(images)
    expected, original = _whole(images, tmp_path / "whole"), getattr(Place, method)
    for stop in range(100):
        place, calls = tmp_path / f"at{stop}", [0]
        shutil.copytree(first, place)

        def stopping(self, *more, calls=calls, stop=stop):
            calls[0] += 1
            if calls[0] == stop + 1:
                raise DataError("stopped")
            return original(self, *more)

        monkeypatch.setattr(Place, method, stopping)
        try:
            _update(place, images)
            ended = True
        except DataError:
            ended = False
        monkeypatch.setattr(Place, method, original)
        _, result = _update(place, images)
        assert _sorted_rows(place) == expected
        assert len(result.plan.later) == 1
        gone = pads.dataset(place / GONE / "0002" / "instances").to_table()["image_id"].to_pylist()
        assert sorted(gone) == ["05", "06", "07"]
        if ended:
            break
    assert stop > 0


def test_a_plain_call_ends_an_update_that_was_stopped(images, tmp_path, monkeypatch):
    _update(tmp_path / "out", images)
    _change(images)
    monkeypatch.setattr("scoring.parts.job.amend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _update(tmp_path / "out", images)
    monkeypatch.undo()
    place = Place(tmp_path / "out")
    assert place.names(GENERATIONS) == []
    plan = updated(place, read_plan(place), open_listing(images), _requested(images), tmp_path / "out" / UPDATING)
    assert len(plan.later) == 1
    local = LocalParts(LocalRunner(Brightness()), place, plan, SETTINGS, tmp_path / "out" / SCRATCH)
    run_parts(place, plan, local, lambda r, *_: r)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")


def test_a_part_that_lost_its_mark_is_scored_and_amended_again(images, tmp_path):
    _update(tmp_path / "out", images)
    _change(images)
    expected = _whole(images, tmp_path / "whole")
    place = Place(tmp_path / "out")
    plan = updated(place, read_plan(place), open_listing(images), _requested(images), tmp_path / "out" / UPDATING)
    (tmp_path / "out" / "done" / "part-000001.json").unlink()
    local = LocalParts(LocalRunner(Brightness()), place, plan, SETTINGS, tmp_path / "out" / SCRATCH)
    run_parts(place, plan, local, lambda r, *_: r)
    assert _sorted_rows(place) == expected


def test_an_image_that_could_not_be_had_is_tried_again_in_a_part_that_lost_others(images, tmp_path):
    listed = tmp_path / "list.csv"
    names = [f"{images}/{p.name}" for p in sorted(images.iterdir())] + [f"{images}/later.png"]
    listed.write_text("\n".join(["path", *names]) + "\n")
    place = tmp_path / "out"
    assert _update(place, listed)[1].failures == 3
    # The last part has 11b, 12, 13 and the one that is to come.
    listed.write_text("\n".join(["path", *(n for n in names if not n.endswith("12.png"))]) + "\n")
    result = _update(place, listed)[1]
    assert (result.failures, result.plan.later[0].news.unreadable) == (3, 0)
    write_image(images / "later.png", 20, 30, 60)
    predictor, result = _update(place, listed)
    assert (predictor.seen, result.failures) == (1, 2)
    assert [row["image_id"] for row in _sorted_rows(place)[0]][-1] == "later"
    assert len(result.plan.later) == 1
    assert _sorted_rows(place) == _whole(listed, tmp_path / "whole")


def test_an_image_that_could_not_be_had_and_goes_is_not_tried_again(images, tmp_path):
    listed, place = tmp_path / "list.csv", tmp_path / "out"
    names = [f"{images}/{p.name}" for p in sorted(images.iterdir())]
    listed.write_text("\n".join(["path", *names, f"{images}/later.png"]) + "\n")
    assert [mark.again for mark in _marks(_update(place, listed)[1])] == [0, 0, 1]
    listed.write_text("\n".join(["path", *names]) + "\n")
    assert [mark.again for mark in _marks(_update(place, listed)[1])] == [0, 0, 0]


def test_a_file_that_cannot_be_looked_at_keeps_its_rows(images, tmp_path, monkeypatch):
    _update(tmp_path / "out", images)
    before = _sorted_rows(tmp_path / "out")
    listed = open_listing(images)
    marks = updates.plan_changes.__globals__["fingerprints"]
    monkeypatch.setitem(
        updates.plan_changes.__globals__,
        "fingerprints",
        lambda paths: ["unreadable" if p.name == "02.png" else m for p, m in zip(paths, marks(paths), strict=True)],
    )
    write_image(images / "new.png", 20, 30, 44)
    predictor, result = _update(tmp_path / "out", images)
    assert listed.where == str(images)
    assert (predictor.seen, result.plan.later[0].news.unreadable) == (1, 1)
    assert _sorted_rows(tmp_path / "out")[0][: len(before[0])] == before[0]


def test_what_a_kill_has_left_is_not_in_the_way(images, tmp_path):
    _update(tmp_path / "out", images)
    left = tmp_path / "out" / UPDATING / "listed"
    left.mkdir(parents=True)
    (left / "000000.parquet").write_bytes(b"half")
    (left / "complete").write_text("yesterday")
    write_image(images / "new.png", 20, 30, 44)
    assert _update(tmp_path / "out", images)[0].seen == 1
    assert not (tmp_path / "out" / UPDATING).exists()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"none")])
def test_damaged_lists_say_so(images, tmp_path, damage):
    _update(tmp_path / "out", images)
    damage(tmp_path / "out" / "inputs" / "part-000001.parquet")
    with pytest.raises((DataError, OutputError), match=r"part-000001\.parquet") as error:
        _update(tmp_path / "out", images)
    assert "\n" not in str(error.value)


def test_a_mended_image_beside_one_that_is_tried_again_is_scored(images, tmp_path):
    listed, place = tmp_path / "list.csv", tmp_path / "out"
    names = [f"{images}/{name}.png" for name in ("04b", "later", "00")]
    listed.write_text("\n".join(["path", *names]) + "\n")
    assert _update(place, listed)[1].failures == 2
    for name in ("04b", "later"):
        write_image(images / f"{name}.png", 20, 30, 60)
    predictor, result = _update(place, listed)
    assert (predictor.seen, result.failures) == (2, 0)
    assert _sorted_rows(place) == _whole(listed, tmp_path / "whole")


@pytest.mark.parametrize("method", ["write", "publish"])
def test_stopped_while_it_tries_again_the_sums_are_those_of_the_tables(images, tmp_path, monkeypatch, method):
    listed, original = tmp_path / "list.csv", getattr(Place, method)
    listed.write_text("\n".join(["path", *(f"{images}/{name}.png" for name in ("00", "later", "04b"))]) + "\n")
    _update(tmp_path / "first", listed)
    write_image(images / "later.png", 20, 30, 60)
    for here in (True, False):
        for stop in range(4):
            place, calls = tmp_path / f"at{here}{stop}", [0]
            shutil.copytree(tmp_path / "first", place)

            def stopping(self, *more, calls=calls, stop=stop):
                calls[0] += 1
                if calls[0] == stop + 1:
                    raise OutputError("stopped")
                return original(self, *more)

            monkeypatch.setattr(Place, method, stopping)
            with suppress(OutputError):
                _plain(place, listed)
            monkeypatch.setattr(Place, method, original)
            if not here:
                # Another machine goes on, which has nothing of that.
                shutil.rmtree(place / SCRATCH, ignore_errors=True)
            result = _plain(place, listed)
            rows = _sorted_rows(place)
            assert (result.images, result.failures) == (len(rows[0]), len(rows[1])) == (2, 1)
            summary = json.loads((place / "summary.json").read_text())
            assert (summary["images"], summary["failures"]) == (2, 1)


def _plain(place, images):
    place = Place(place)
    with held(place):
        plan = planned(place, open_listing(images), _requested(images))
        local = LocalParts(LocalRunner(Brightness()), place, plan, SETTINGS, working_folder(place, SCRATCH, None))
        return run_parts(place, plan, local, lambda r, *_: r)


@pytest.mark.parametrize("how", ["stopped", "plan deleted", "plan damaged", "update damaged"])
def test_no_update_of_an_earlier_job_is_taken_for_one_of_this(images, tmp_path, how):
    place = tmp_path / "out"
    _update(place, images)
    _change(images)
    _update(place, images)
    if how == "update damaged":
        (place / GENERATIONS / "000002.json").write_text("none")
        with pytest.raises(DataError, match="score with --fresh"):
            _update(place, images)
    if how == "plan damaged":
        (place / "plan.json").write_text("none")
        with pytest.raises(DataError, match="score with --fresh"):
            _update(place, images)
    if how in ("stopped", "plan deleted"):
        (place / "plan.json").unlink()
    else:
        with held(Place(place)):
            plan = planned(Place(place), open_listing(images), _requested(images), fresh=True)
        assert plan.later == ()
    _, result = _update(place, images)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")
    assert (result.plan.later, result.resumed) == ((), 0 if how in ("stopped", "plan deleted") else result.resumed)
    assert not (place / GENERATIONS).exists()
    assert not (place / GONE).exists()
    assert [p.name for p in place.glob("plan-*")] == [result.plan.folder]


def test_updates_that_do_not_follow_one_another_are_refused(images, tmp_path):
    place = tmp_path / "out"
    _update(place, images)
    for number in range(2):
        write_image(images / f"new{number}.png", 20, 30, 44)
        _update(place, images)
    (place / GENERATIONS / "000002.json").unlink()
    with pytest.raises(DataError, match="is no update of the plan before it; score with --fresh"):
        _update(place, images)


def test_lists_that_a_stop_has_left_are_not_taken_for_those_of_another_update(images, tmp_path, monkeypatch):
    place, original = tmp_path / "out", Place.create
    _update(place, images)
    ten = [images / f"x{number}.png" for number in range(10)]

    def arrive():
        for number, path in enumerate(ten):
            write_image(path, 20, 30, 60 + number)

    def stopped(*_):
        raise DataError("stopped")

    arrive()
    monkeypatch.setattr(Place, "create", stopped)
    with pytest.raises(DataError, match="stopped"):
        _update(place, images)
    monkeypatch.setattr(Place, "create", original)
    for path in ten:
        path.unlink()
    write_image(images / "other.png", 20, 30, 50)
    _update(place, images)
    arrive()
    _update(place, images)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")


def test_dark_images_that_an_update_has_taken_are_not_counted(tmp_path):
    class Dark(Brightness):
        pass

    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.png", 20, 30, 1)
    _update(tmp_path / "out", tmp_path / "in")
    for name in "abc":
        (tmp_path / "in" / f"{name}.png").unlink()
    cv2.imwrite(str(tmp_path / "in" / "d.png"), np.tile(np.arange(0, 240, 8, dtype=np.uint8), (20, 1)))
    _, result = _update(tmp_path / "out", tmp_path / "in")
    assert (result.totals.little, result.totals.first_little) == (0, "")


def test_where_every_image_fails_the_next_ones_are_taken_still(tmp_path):
    images, place = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    for name in "ab":
        (images / f"{name}.png").write_bytes(b"none")
    with pytest.raises(DataError, match="none of 2 images could be scored"):
        check_any(_update(place, images)[1])
    write_image(images / "c.png", 20, 30, 44)
    _, result = _update(place, images)
    assert (result.images, result.failures) == (1, 2)
    assert json.loads((place / "summary.json").read_text())["images"] == 1


def test_another_machine_that_was_first_is_not_overwritten(images, tmp_path):
    out = tmp_path / "out"
    place = Place(out)
    plan = planned(place, open_listing(images), _requested(images))

    class Slow(Brightness):
        def predict(self, batch):
            if not self.seen:
                # Another machine scores all of it and brings it up to date, while this one is at its first image.
                other = LocalParts(LocalRunner(Brightness()), place, plan, SETTINGS, tmp_path / "other")
                run_parts(place, plan, other, lambda r, *_: r)
                _change(images)
                _update(out, images)
            return super().predict(batch)

    slow = LocalParts(LocalRunner(Slow()), place, plan, SETTINGS, tmp_path / "slow")
    run_parts(place, plan, slow, lambda r, *_: r)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")


def test_folders_whose_names_are_like_columns(images, tmp_path):
    place = tmp_path / "date=2026-11-28" / "digest=x" / "path=1" / "mark=1"
    _update(place, images)
    predictor, _ = _update(place, images)
    assert predictor.seen == 0
    # Those of a job in one piece too.
    for _ in range(2):
        assert _whole(images, tmp_path / "date=2026-11-28" / "path=1")[:2] == _sorted_rows(place)[:2]


def test_a_folder_that_cannot_be_worked_in_is_a_line(images, tmp_path):
    _update(tmp_path / "out", images)
    (tmp_path / "out" / UPDATING).write_text("in the way")
    with pytest.raises(OutputError, match="what is done is kept, call again"):
        _update(tmp_path / "out", images)


def test_names_that_become_shared_are_scored_under_their_new_ones(images, tmp_path):
    _update(tmp_path / "out", images)
    shutil.copy(images / "09.png", images / "09.PNG")
    predictor, _ = _update(tmp_path / "out", images)
    assert predictor.seen == 2
    rows = _sorted_rows(tmp_path / "out")
    assert {"09.png", "09.PNG"} <= {row["image_id"] for row in rows[0]}
    assert rows == _whole(images, tmp_path / "whole")


def test_two_that_update_at_once_agree_on_one_generation(images, tmp_path, monkeypatch):
    place = Place(tmp_path / "out")
    _update(tmp_path / "out", images)
    plan = read_plan(place)
    write_image(images / "a.png", 20, 30, 70)
    original = Place.create

    def another_first(self, name, content):
        monkeypatch.setattr(Place, "create", original)
        write_image(images / "b.png", 20, 30, 71)
        updated(place, plan, open_listing(images), _requested(images), tmp_path / "second")
        return original(self, name, content)

    monkeypatch.setattr(Place, "create", another_first)
    mine = updated(place, plan, open_listing(images), _requested(images), tmp_path / "first")
    assert mine == read_plan(place)
    assert (len(mine.later), mine.later[0].images) == (1, 2)
    _, result = _update(tmp_path / "out", images)
    assert len(result.plan.later) == 1
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")


def test_into_a_bucket_where_the_list_tells_what_has_changed(images, tmp_path, monkeypatch):
    # No file is asked for its mark to learn what is new.
    monkeypatch.setitem(updates.plan_changes.__globals__, "fingerprints", None)
    with s3_server("jobs"):
        there = Place("s3://jobs/in/x")
        fs = there.path.fs

        def upload(*names):
            for name in names:
                fs.pipe_file(f"jobs/in/{name}", (images / name).read_bytes())

        upload(*(p.name for p in images.iterdir()))
        place, cache = Place("s3://jobs/out/m-1"), tmp_path / "cache"
        _update(place, "s3://jobs/in", cache=cache)
        predictor, result = _update(place, "s3://jobs/in", cache=cache)
        assert (predictor.seen, result.plan.later) == (0, ())
        _change(images)
        fs.rm([f"jobs/in/{name}" for name in ("05.png", "06.png", "07.png")])
        upload("02b.png", "99.png", "03.png", "renamed.png", "08.png", "11b.png")
        predictor, result = _update(place, "s3://jobs/in", cache=cache)
        assert predictor.seen == 5
        news = result.plan.later[0].news
        assert (news.new, news.changed, news.gone) == (3, 3, 3)
        rows = _sorted_rows(place)
        expected = _whole(images, tmp_path / "whole")
        for mine, other in zip(rows[:2], expected[:2], strict=True):
            assert [{**r, "path": 0, "message": 0} for r in mine] == [{**r, "path": 0, "message": 0} for r in other]
        assert not list(cache.rglob("part-*"))
        # --fresh takes all of it away.
        with held(place, cache):
            planned(place, open_listing("s3://jobs/in"), _requested("s3://jobs/in"), fresh=True, cache=cache)
        left = Counter(key.split("/")[3] for key in fs.find("jobs/out/m-1"))
        assert set(left) == {"plan.json", read_plan(place).folder}


def test_fresh_leaves_nothing_of_the_generations(images, tmp_path):
    _update(tmp_path / "out", images)
    _change(images)
    _update(tmp_path / "out", images)
    (tmp_path / "out" / "mine.txt").write_text("kept")
    (tmp_path / "out" / LOGGED).write_text("of the earlier job")
    with held(Place(tmp_path / "out")):
        plan = planned(Place(tmp_path / "out"), open_listing(images), _requested(images), fresh=True)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"plan.json", plan.folder, "mine.txt", ".lock"} or names == {"plan.json", plan.folder, "mine.txt"}
    assert plan.later == ()


def test_a_list_file_of_another_night_is_compared_with_the_first(images, tmp_path):
    frame = pd.DataFrame({"path": [f"{images}/{p.name}" for p in sorted(images.iterdir())]})
    frame[:10].to_parquet(tmp_path / "list.parquet")
    _update(tmp_path / "out", tmp_path / "list.parquet")
    frame[4:].to_parquet(tmp_path / "list.parquet")
    _, result = _update(tmp_path / "out", tmp_path / "list.parquet")
    news = result.plan.later[0].news
    assert (news.new, news.changed, news.gone, news.kept) == (6, 0, 4, 6)
    assert _sorted_rows(tmp_path / "out") == _whole(tmp_path / "list.parquet", tmp_path / "whole")


def test_lists_that_a_stopped_planning_has_left_are_those_of_its_parts(images, tmp_path, monkeypatch):
    place, original = Place(tmp_path / "out"), Place.create
    monkeypatch.setattr(Place, "create", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        planned(place, open_listing(images), _requested(images, part_size=3))
    monkeypatch.setattr(Place, "create", original)
    _update(tmp_path / "out", images)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")


def test_lists_that_an_update_has_made_shorter_are_not_taken_for_whole_ones(images, tmp_path):
    place = tmp_path / "out"
    _update(place, images)
    kept = (images / "05.png").read_bytes()
    (images / "05.png").unlink()
    _update(place, images)
    (images / "05.png").write_bytes(kept)
    (place / "plan.json").unlink()
    _update(place, images)
    assert _sorted_rows(place) == _whole(images, tmp_path / "whole")
