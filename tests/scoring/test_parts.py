"""Jobs in parts: planned on disk, scored and published part by part, with the rows of a job that is not in parts."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import duckdb
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from models.errors import DataError, OutputError
from models.images.rendering import DEFAULT
from pipelines.data.readers.listing import _in_bucket, open_listing
from pipelines.data.readers.opening import open_dataset
from scoring.jobs import shards
from scoring.jobs.job import decisive_settings, run_job
from scoring.jobs.manifest import LOCK, PLAN, read_manifest
from scoring.parts import job as parts_job
from scoring.parts import planning
from scoring.parts.job import SCRATCH, LocalParts, check_any, clear_parts, held, planned, run_parts, working_folder
from scoring.parts.place import Place
from scoring.parts.plan import read_plan
from scoring.parts.planning import plan_images
from scoring.requests import JobSettings
from scoring.runners.local import LocalRunner
from tests.conftest import write_image
from tests.scoring.bad_files import write_bad_files
from tests.scoring.test_job import Brightness
from tests.stores import s3_server

COUNT = 28
SETTINGS = JobSettings(shard_size=3, score_threshold=0.0, overlays=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty small images, some files that are none, and two that share a name but for the ending."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(20):
        write_image(folder / f"i {i:02} ü.png", 20 + i % 4, 30, i)
    shutil.copy(folder / "i 03 ü.png", folder / "i 04 ü.PNG")
    write_bad_files(folder, 7)
    assert len(list(folder.iterdir())) == COUNT
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Instances and errors of a job over them that is not in parts."""
    folder = tmp_path_factory.mktemp("whole")
    run_job(Brightness(), "m/1", open_dataset(images), folder, settings=SETTINGS, progress=lambda r, *_: r)
    return [pq.read_table(folder / "m-1" / f"{name}.parquet").to_pylist() for name in ("instances", "errors")]


def _requested(images, settings=SETTINGS, **more):
    decisive = decisive_settings(Brightness(), DEFAULT, settings, "cpu")
    known = {"label": "m/1", "model": "aa", "settings": decisive, "data": "in", "source": str(images), "split": "test"}
    return {**known, "category": "plane", "part_size": 6, "shard_size": settings.shard_size, **more}


def _run(place, images, predictor=None, progress=lambda r, *_: r, fresh=False, cache=None, **more):
    place = place if isinstance(place, Place) else Place(place)
    with held(place, cache):
        plan = planned(place, open_listing(images), _requested(images, **more), fresh=fresh, cache=cache)
        runner = LocalRunner(predictor or Brightness())
        local = LocalParts(runner, place, plan, SETTINGS, working_folder(place, SCRATCH, cache))
        result = run_parts(place, plan, local, progress)
        check_any(result)
        return result


def _rows(place):
    """Instances and errors of the parts that are there, in their order."""
    place = place if isinstance(place, Place) else Place(place)
    tables = []
    for name in ("instances", "errors"):
        files = place.names(name)
        tables.append([row for file in files for row in pq.read_table(_opened(place, f"{name}/{file}")).to_pylist()])
    return tables


def _paths(listing, done=0, last=""):
    return [entry.path for entry in listing.stream(done, last)]


def _opened(place, name):
    return pa.BufferReader(place.read(name))


def test_the_rows_are_those_of_a_job_that_is_not_in_parts(images, whole, tmp_path):
    result = _run(tmp_path / "out", images)
    assert _rows(tmp_path / "out") == whole
    assert (result.images, result.failures) == (len(whole[0]), len(whole[1]))
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != LOCK) == sorted(
        ["done", "errors", "inputs", "instances", PLAN, result.plan.folder, "summary.json"]
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["parts"], summary["images"], summary["failures"]) == (5, len(whole[0]), len(whole[1]))
    # What other programs read as one table.
    ids = [row["image_id"] for row in whole[0]]
    assert pd.read_parquet(tmp_path / "out" / "instances")["image_id"].tolist() == ids
    assert pads.dataset(tmp_path / "out" / "instances").to_table()["image_id"].to_pylist() == ids
    found = duckdb.sql(f"SELECT image_id, score FROM '{tmp_path}/out/instances/*.parquet' ORDER BY image_id").fetchall()
    assert found == sorted((row["image_id"], row["score"]) for row in whole[0])
    inputs = pads.dataset(tmp_path / "out" / "inputs").to_table()
    assert inputs["image_id"].to_pylist() == [s.image_id for s in open_dataset(images).samples]
    assert inputs["digest"].to_pylist() == open_dataset(images).file_digests()


@pytest.mark.soak
def test_spark_reads_the_tables(images, whole, tmp_path, monkeypatch):
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    _run(tmp_path / "out", images)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    builder = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
    try:
        table = session.read.parquet(str(tmp_path / "out" / "instances"))
        rows = {(row["image_id"], row["score"]) for row in table.select("image_id", "score").collect()}
    finally:
        session.stop()
    assert rows == {(row["image_id"], row["score"]) for row in whole[0]}


def test_stopped_at_every_image_and_called_again_it_ends_the_same(images, whole, tmp_path):
    for stop in (0, 1, 4, 9, 14, 19):
        out = tmp_path / f"at{stop}"
        first = Brightness(stop)
        with pytest.raises(KeyboardInterrupt):
            _run(out, images, first)
        # What is there already is that of whole parts.
        rows, done = _rows(out), Place(out).names("done")
        assert rows[0] == whole[0][: len(rows[0])]
        assert len(done) == len(Place(out).names("instances"))
        second = Brightness()
        result = _run(out, images, second)
        assert _rows(out) == whole
        # At most a shard is lost.
        assert first.seen + second.seen <= len(whole[0]) + 3
        assert result.resumed == sum(result.plan.size(n) for n in range(len(done)))
    third = Brightness()
    assert _run(out, images, third).resumed == result.plan.images
    assert third.seen == 0


@pytest.mark.parametrize("name", ["instances", "errors", "inputs", "done"])
def test_a_stop_between_the_files_of_a_part_leaves_it_undone(images, whole, tmp_path, monkeypatch, name):
    write, publish = Place.write, Place.publish

    def failing(method):
        def call(self, file, *more):
            if file.startswith(f"{name}/part-000002"):
                raise KeyboardInterrupt
            return method(self, file, *more)

        return call

    monkeypatch.setattr(Place, "write", failing(write))
    monkeypatch.setattr(Place, "publish", failing(publish))
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images)
    assert Place(tmp_path / "out").names("done") == ["part-000000.json", "part-000001.json"]
    monkeypatch.undo()
    second = Brightness()
    _run(tmp_path / "out", images, second)
    assert _rows(tmp_path / "out") == whole
    # The part was scored already; only the ones after it are scored now.
    assert second.seen == len(_rows(tmp_path / "out")[0]) - sum(
        json.loads((tmp_path / "out" / "done" / f"part-00000{n}.json").read_text())["totals"]["images"] for n in range(3)
    )


def test_what_was_listed_stays_the_list_until_it_is_listed_anew(images, tmp_path):
    mine = tmp_path / "in"
    shutil.copytree(images, mine)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", mine, Brightness(8))
    write_image(mine / "a new one.png", 20, 30, 9)
    assert _run(tmp_path / "out", mine).plan.images == COUNT
    again = _run(tmp_path / "out", mine, fresh=True)
    assert again.plan.images == COUNT + 1
    assert [p.name for p in (tmp_path / "out").glob("plan-*")] == [again.plan.folder]
    assert _rows(tmp_path / "out")[0][0]["image_id"] == "a new one"


def test_another_job_is_not_mixed_in(images, tmp_path):
    _run(tmp_path / "out", images)
    before = _rows(tmp_path / "out")
    for more, why in (
        ({"model": "bb"}, "model aa, not bb"),
        ({"part_size": 9}, "part_size 6, not 9"),
        ({"source": "elsewhere"}, f"source {images}, not elsewhere"),
        ({"settings": JobSettings(shard_size=3, score_threshold=0.5)}, "score_threshold 0.0, not 0.5"),
    ):
        with pytest.raises(DataError, match=re.escape(f"holds a scoring with {why}; name another --out, or --fresh")):
            _run(tmp_path / "out", images, **more)
    assert _rows(tmp_path / "out") == before
    with pytest.raises(DataError, match=r"a scoring in parts, whose planes are in .*/instances/\*\.parquet"):
        read_manifest(tmp_path / "out")
    (tmp_path / "out" / PLAN).write_text("{")
    with pytest.raises(DataError, match=r"plan\.json: damaged or of another release; score with --fresh"):
        _run(tmp_path / "out", images)
    _run(tmp_path / "out", images, fresh=True)
    assert _rows(tmp_path / "out") == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    clear_parts(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [LOCK, "notes.txt"]


@pytest.mark.parametrize("left", range(1, 7))
def test_a_removal_that_is_stopped_leaves_nothing_for_the_next_job(images, tmp_path, monkeypatch, left):
    other = tmp_path / "in"
    for i in range(4):
        write_image(other / f"{i}.png", 20, 30, i)
    _run(tmp_path / "out", images)
    remove, calls = Place.remove, []

    def stopping(self, folder, names):
        if len(calls) == left:
            raise KeyboardInterrupt
        calls.append(folder)
        remove(self, folder, names)

    monkeypatch.setattr(Place, "remove", stopping)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", other, fresh=True)
    monkeypatch.undo()
    second = Brightness()
    result = _run(tmp_path / "out", other, second)
    assert second.seen == result.images == 4
    assert [row["image_id"] for row in _rows(tmp_path / "out")[0]] == ["0", "1", "2", "3"]
    assert _rows(tmp_path / "out")[1] == []


def test_marks_of_another_plan_and_removed_parts_do_not_count(images, whole, tmp_path):
    _run(tmp_path / "out", images)
    mark = tmp_path / "out" / "done" / "part-000001.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "plan": "another"}))
    second = Brightness()
    _run(tmp_path / "out", images, second)
    assert second.seen == json.loads(mark.read_text())["totals"]["images"] > 0
    assert _rows(tmp_path / "out") == whole

    class Removing(Brightness):
        def predict(self, given):
            (tmp_path / "out" / "done" / "part-000000.json").unlink(missing_ok=True)
            return super().predict(given)

    mark.unlink()
    with pytest.raises(OutputError, match="somebody has removed parts of it meanwhile; call again"):
        _run(tmp_path / "out", images, Removing())
    assert _run(tmp_path / "out", images).images == len(whole[0])


def test_a_folder_of_a_job_that_is_not_in_parts_is_not_used(images, whole, tmp_path):
    run_job(Brightness(), "m/1", open_dataset(images), tmp_path, settings=SETTINGS, progress=lambda r, *_: r)
    with pytest.raises(DataError, match="holds a scoring that is not in parts"):
        _run(tmp_path / "m-1", images)
    _run(tmp_path / "m-1", images, fresh=True)
    assert _rows(tmp_path / "m-1") == whole
    assert not {"manifest.json", "inputs.parquet", "done.json"} & {p.name for p in (tmp_path / "m-1").iterdir()}


def test_one_process_at_a_time_scores_into_a_folder(images, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / LOCK), pytest.raises(OutputError, match="another score is writing there"):
        _run(tmp_path / "out", images)


def test_images_that_could_not_be_had_are_tried_again_and_no_others(images, tmp_path):
    mine = tmp_path / "in"
    shutil.copytree(images, mine)
    listing = tmp_path / "list.csv"
    paths = [*sorted(mine.glob("i *.png"))[:10], mine / "later.png", mine / "never.png"]
    pd.DataFrame({"path": paths}).to_csv(listing, index=False)
    first = Brightness()
    _run(tmp_path / "out", listing, first)
    failed = [row["image_id"] for row in _rows(tmp_path / "out")[1]]
    assert failed == ["later", "never"]
    kept = _rows(tmp_path / "out")[0]
    marks = pads.dataset(tmp_path / "out" / "inputs").to_table().to_pylist()
    nothing = Brightness()
    _run(tmp_path / "out", listing, nothing)
    assert nothing.seen == 0
    # An image whose row stays has the mark that it was scored with.
    write_image(paths[-3], 50, 50, 3)
    write_image(mine / "later.png", 20, 30, 77)
    second, shown = Brightness(), []
    result = _run(tmp_path / "out", listing, second, lambda items, *_: (shown.append(item) or item for item in items))
    assert second.seen == 1
    assert not shown
    assert (result.images, result.failures) == (11, 1)
    rows = _rows(tmp_path / "out")
    assert [row for row in rows[0] if row["image_id"] != "later"] == kept
    assert [row["image_id"] for row in rows[1]] == ["never"]
    after = pads.dataset(tmp_path / "out" / "inputs").to_table().to_pylist()
    assert [row["image_id"] for row, old in zip(after, marks, strict=True) if row["digest"] != old["digest"]] == ["later"]


def test_files_that_change_while_a_part_is_scored_do_not_mix(tmp_path):
    for i in range(8):
        write_image(tmp_path / "in" / f"{i}.png", 20, 30, i)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", tmp_path / "in", Brightness(4))
    # Of the part that was not finished, a shard is on disk.
    assert list((tmp_path / "out" / SCRATCH / "part-000000" / "shards").iterdir())
    write_image(tmp_path / "in" / "0.png", 40, 40, 99)
    second = Brightness()
    _run(tmp_path / "out", tmp_path / "in", second)
    assert second.seen == 8
    assert _rows(tmp_path / "out")[0][0]["height"] == 40


def test_nothing_of_the_users_is_removed(images, whole, tmp_path):
    out = tmp_path / "out"
    for folder in ("inputs", "instances", "done", "errors"):
        (out / folder / "below").mkdir(parents=True)
        for name in ("mine.parquet", "notes.tmp", "below/part-000000.parquet"):
            (out / folder / name).write_text("mine")
    for fresh in (False, True):
        _run(out, images, fresh=fresh)
        assert _rows_of_parts(out) == whole
    clear_parts(out)
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name != LOCK)
    names = ("below/part-000000.parquet", "mine.parquet", "notes.tmp")
    assert left == [f"{folder}/{name}" for folder in ("done", "errors", "inputs", "instances") for name in names]


def _rows_of_parts(out):
    tables = []
    for name in ("instances", "errors"):
        files = sorted((out / name).glob("part-*.parquet"))
        tables.append([row for file in files for row in pq.read_table(file).to_pylist()])
    return tables


def test_what_a_kill_left_half_written_is_swept(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images, Brightness(8))
    left = tmp_path / "out" / "instances" / ".part-000001.parquet-x1.tmp"
    left.write_text("half")
    _run(tmp_path / "out", images)
    assert not left.exists()


def test_a_mark_that_is_damaged_counts_as_none(images, whole, tmp_path):
    _run(tmp_path / "out", images)
    for content in ("", "{}", '{"plan": 1}'):
        (tmp_path / "out" / "done" / "part-000002.json").write_text(content)
        second = Brightness()
        result = _run(tmp_path / "out", images, second)
        assert second.seen == json.loads((tmp_path / "out" / "done" / "part-000002.json").read_text())["totals"]["images"]
        assert result.resumed == COUNT - 6
        assert _rows(tmp_path / "out") == whole


def test_the_rate_is_that_of_this_call(images, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images, Brightness(8))
    done = json.loads((tmp_path / "out" / "done" / "part-000000.json").read_text())["totals"]["images"]
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(parts_job, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    second = _run(tmp_path / "out", images)
    monkeypatch.undo()
    assert second.rate == pytest.approx((second.images - done) / 4)
    assert second.totals.seconds == pytest.approx(
        sum(json.loads(p.read_text())["totals"]["seconds"] for p in (tmp_path / "out" / "done").iterdir())
    )
    assert _run(tmp_path / "out", images).rate is None


def test_in_a_bucket_fresh_forgets_what_this_machine_has(tmp_path):
    """Parts that are begun, and lists of images, lie in its cache."""
    for i in range(8):
        write_image(tmp_path / "in" / f"{i}.png", 20, 30, i)
    place, cache = Place("memory://forgetting/m-1"), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        _run(place, tmp_path / "in", Brightness(4), cache=cache)
    assert list(cache.rglob("shards/*"))
    second = Brightness()
    _run(place, tmp_path / "in", second, cache=cache, fresh=True)
    assert second.seen == 8
    # A plan that is stopped after its images are listed.
    other = Place("memory://forgetting/m-2")

    def stopping(*_):
        raise DataError("stopped")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match="stopped"):
        patch.setattr(planning, "_named", stopping)
        _run(other, tmp_path / "in", cache=cache)
    write_image(tmp_path / "in" / "8.png", 20, 30, 8)
    assert _run(other, tmp_path / "in", cache=cache, fresh=True).images == 9
    fsspec.filesystem("memory").rm("/forgetting", recursive=True)


def test_one_process_of_a_machine_at_a_time_fills_a_bucket(images, tmp_path):
    place = Place("memory://held/m-1")
    folder = working_folder(place, "", tmp_path)
    folder.mkdir(parents=True)
    with FileLock(folder / LOCK), pytest.raises(OutputError, match="another score is writing there"):
        _run(place, images, cache=tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(images, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file/out: cannot be written \(Not a directory\)"):
        _run(tmp_path / "file" / "out", images)


def test_all_images_failing_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"none of 5 images could be scored; see .*/out/errors"):
        _run(tmp_path / "out", tmp_path / "in")


def test_the_bar_counts_every_image_once(images, tmp_path):
    counted = []

    def progress(items, total, title):
        counted.append([total, 0])
        for item in items:
            counted[-1][1] += 1
            yield item

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images, Brightness(11), progress)
    parts = len(Place(tmp_path / "out").names("done"))
    _run(tmp_path / "out", images, progress=progress)
    assert parts == 2
    assert counted[0][0] == COUNT
    assert counted[1][0] == counted[1][1] == COUNT - 6 * parts


@pytest.fixture
def cut(monkeypatch):
    """Pieces of three paths."""
    monkeypatch.setattr(planning, "PIECE", 3)


def _planned(listing, staging, part_size=4):
    listed = plan_images(listing, staging, part_size)
    rows = [row for file in sorted(listed.folder.iterdir()) for row in pq.read_table(file).to_pylist()]
    assert len(rows) == listed.images
    return listed, [(row["image_id"], row["path"]) for row in rows]


def test_images_are_named_as_data_sets_name_them(cut, tmp_path):
    draw = random.Random(0)
    for number in range(40):
        folder = tmp_path / str(number)
        names = set()
        for _ in range(draw.randrange(1, 14)):
            below = draw.choice(["", "", "a/", "b/", "b/c/", "a-b/"])
            names.add(f"{below}{draw.choice('xyz')}{draw.choice(['', '1', '.v2'])}{draw.choice(['.png', '.jpg', '.TIF'])}")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        paths = draw.sample(sorted(names), len(names))
        if number % 2:
            pd.DataFrame({"path": paths}).to_csv(folder / "list.csv", index=False)
            where = folder / "list.csv"
        else:
            where = folder / "**" / "*.*"
        try:
            expected = [(s.image_id, str(s.path)) for s in open_dataset(where).samples]
        except DataError as error:
            with pytest.raises(DataError, match=re.escape(str(error).partition(": ")[2])):
                _planned(open_listing(where), tmp_path / "staging" / str(number))
            continue
        found = _planned(open_listing(where), tmp_path / "staging" / str(number))[1]
        # Globs are sorted by folder there, by path here.
        assert found == (expected if number % 2 else sorted(expected, key=lambda pair: pair[1]))


def test_a_clash_of_names_and_an_image_twice_are_refused(cut, tmp_path):
    for name in ("a.png", "a.jpg", "a.png.tif"):
        (tmp_path / name).touch()
    for opened in (open_dataset, lambda where: plan_images(open_listing(where), tmp_path.with_name("staging"), 4)):
        with pytest.raises(DataError, match=r"image 'a\.png' appears 2 times; image names must be unique"):
            opened(tmp_path)
    pd.DataFrame({"path": ["a.png", "b.png", "c.png", "a.png"]}).to_parquet(tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"image '.*a\.png' appears 2 times"):
        plan_images(open_listing(tmp_path / "list.parquet"), tmp_path / "staging", 4)


def test_names_that_others_have_are_no_clash_where_those_are_renamed_too(cut, tmp_path):
    names = ["a.jpg", "a.png", "a.png.jpg", "a.png.tif"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    assert [s.image_id for s in open_dataset(tmp_path / "in").samples] == names
    assert [pair[0] for pair in _planned(open_listing(tmp_path / "in"), tmp_path / "staging")[1]] == names


def test_sorting_writes_nothing_where_outputs_go(tmp_path):
    with planning._database(tmp_path / "sorting") as database:
        assert database.sql("SELECT current_setting('enable_progress_bar')").fetchall() == [(False,)]


def test_plans_differ_by_all_that_decides_rows(images, tmp_path):
    plan = _run(tmp_path / "out", images).plan
    for field, value in (("inputs", "x"), ("model", "x"), ("images", 27), ("part_size", 9), ("settings", {})):
        assert plan.model_copy(update={field: value}).digest != plan.digest
    assert plan.model_copy(update={"planned": "x"}).digest == plan.digest
    held = plan.model_copy(update={"settings": {**plan.settings, "kaggle_score_threshold": 0.5}})
    assert held.refusal(_requested(images)) == "kaggle_score_threshold 0.5, not None"
    assert plan.refusal(_requested(images)) == ""


def test_a_bucket_is_listed_page_by_page():
    """Of more keys than a page has; after a stop the pages before are not asked for again."""
    keys = [f"in/{i}.png" for i in range(5)]
    asked = []

    def call_s3(method, **request):
        assert method == "list_objects_v2"
        assert not {"StartAfter", "ContinuationToken"} <= set(request)
        asked.append({k: v for k, v in request.items() if k in ("StartAfter", "ContinuationToken")})
        after = request.get("ContinuationToken", request.get("StartAfter", ""))
        rest = [key for key in keys if key > after]
        more = {"IsTruncated": len(rest) > 2, "NextContinuationToken": rest[1] if len(rest) > 2 else None}
        return {"Contents": [{"Key": key, "Size": 3, "ETag": f'"{key}"'} for key in rest[:2]], **more}

    path = SimpleNamespace(fs=SimpleNamespace(call_s3=call_s3, isfile=lambda key: False), path="bucket/in")
    assert list(_in_bucket(path, "")) == [(f"s3://bucket/{key}", f'3 "{key}"') for key in keys]
    assert asked == [{}, {"ContinuationToken": keys[1]}, {"ContinuationToken": keys[3]}]
    asked.clear()
    assert [e.path for e in _in_bucket(path, f"s3://bucket/{keys[1]}")] == [f"s3://bucket/{key}" for key in keys[2:]]
    assert asked == [{"StartAfter": keys[1]}, {"ContinuationToken": keys[3]}]


def test_lists_that_cannot_be_used_say_why(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no images there"):
        plan_images(open_listing(tmp_path / "empty"), tmp_path / "staging", 4)
    for name, write in (("other.csv", pd.DataFrame.to_csv), ("other.parquet", pd.DataFrame.to_parquet)):
        write(pd.DataFrame({"file": ["a.png"]}), tmp_path / name, index=False)
        with pytest.raises(DataError, match=rf"{name}: no column 'path'; it has: file"):
            open_listing(tmp_path / name).has_more_than(5)
        (tmp_path / name).write_bytes(b"\xff\xfe\x00none")
        with pytest.raises(DataError, match=rf"{name}: not a readable list"):
            open_listing(tmp_path / name).has_more_than(5)


def test_a_name_that_is_not_utf8_is_told(tmp_path):
    write_image(tmp_path / "in" / "a.png", 20, 30, 1)
    try:
        os.rename(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system has no such names")
    for opened in (open_dataset, lambda where: plan_images(open_listing(where), tmp_path / "staging", 4)):
        with pytest.raises(DataError, match=r"in: the name of b'.*\\xff\.png' is not UTF-8; rename the file"):
            opened(tmp_path / "in")


def test_listings_are_what_data_sets_are_made_of(images, tmp_path):
    assert [Path(p).name for p in sorted(_paths(open_listing(images)))] == [
        s.path.name for s in open_dataset(images).samples
    ]
    assert open_listing(images).has_more_than(COUNT - 1)
    assert not open_listing(images).has_more_than(COUNT)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.png").touch()
    (tmp_path / "test" / "b.txt").touch()
    (tmp_path / "test" / "c.png").mkdir()
    assert (_paths(open_listing(tmp_path, "test"))) == [str(tmp_path / "test" / "a.png")]
    with pytest.raises(DataError, match="no split 'trian'"):
        open_listing(tmp_path, "trian")
    (tmp_path / "test_coco.json").write_text("{}")
    assert open_listing(tmp_path, "test") is None
    assert open_listing(tmp_path / "test_coco.json") is None
    assert open_listing(tmp_path / "test" / "a.png") is None


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_a_listing_that_was_stopped_goes_on(kind, cut, tmp_path):
    names = [f"{i:02}.png" for i in range(20)]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).touch()
    where = tmp_path / "in"
    if kind != "folder":
        where = where / f"list.{kind}"
        frame = pd.DataFrame({"path": names[::-1]})
        frame.to_csv(where, index=False) if kind == "csv" else frame.to_parquet(where)
    expected = _planned(open_listing(where), tmp_path / "whole")
    listing = open_listing(where)
    for stop in range(0, 20, 2):
        seen = []

        def stopping(done, last, stop=stop, seen=seen):
            yield from islice(listing.stream(done, last), max(0, stop - done))
            raise KeyboardInterrupt

        staging = tmp_path / f"at{stop}"
        with pytest.raises(KeyboardInterrupt):
            plan_images(replace(listing, stream=stopping), staging, 4)

        def counting(done, last, seen=seen):
            for path in listing.stream(done, last):
                seen.append(path)
                yield path

        again = _planned(replace(listing, stream=counting), staging)
        assert again[1] == expected[1]
        assert again[0].digest == expected[0].digest
        assert len(seen) == (20 if kind == "folder" else 20 - stop // 3 * 3)
    # A list that is another file by now is listed from its start.
    if kind != "folder":
        frame = pd.DataFrame({"path": names[5:]})
        frame.to_csv(where, index=False) if kind == "csv" else frame.to_parquet(where)
        assert [pair[0] for pair in _planned(open_listing(where), staging)[1]] == [name[:2] for name in names[5:]]
    # What is left of another listing is not taken for this one's.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.png").touch()
    assert [pair[0] for pair in _planned(open_listing(tmp_path / "other"), staging)[1]] == ["z"]


def test_a_plan_that_is_stopped_while_it_is_written_is_written_again(images, whole, tmp_path, monkeypatch):
    for target in ("publish", "create"):
        original = getattr(Place, target)
        calls = []

        def stopping(self, *arguments, calls=calls, original=original, target=target):
            calls.append(arguments)
            if len(calls) == 3 or target == "create":
                raise DataError("stopped")
            return original(self, *arguments)

        monkeypatch.setattr(Place, target, stopping)
        with pytest.raises(DataError, match="stopped"):
            _run(tmp_path / target, images)
        assert read_plan(Place(tmp_path / target)) is None
        monkeypatch.undo()
        (folder,) = (tmp_path / target).glob("plan-*")
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
        _run(tmp_path / target, images)
        after = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
        # Five lists, of which those that were there stay.
        assert (len(after), after | before) == (5, after)
        assert _rows(tmp_path / target) == whole
        assert not (tmp_path / target / ".planning").exists()


def test_a_plan_is_of_the_time_when_its_images_were_listed(images, tmp_path, monkeypatch):
    def stopping(*_):
        raise DataError("stopped")

    monkeypatch.setattr(planning, "_named", stopping)
    with pytest.raises(DataError, match="stopped"):
        _run(tmp_path / "out", images)
    monkeypatch.undo()
    complete = tmp_path / "out" / ".planning" / "listed" / "complete"
    assert complete.read_text().startswith("20")
    complete.write_text("2001-02-03T04:05:06+00:00")
    assert _run(tmp_path / "out", images).plan.planned == "2001-02-03T04:05:06+00:00"


def test_of_two_that_plan_at_once_the_first_decides(images, tmp_path, monkeypatch):
    place, create = Place(tmp_path / "out"), Place.create

    def second(self, name, content):
        create(self, name, content.replace(b'"planned": "', b'"planned": "first '))
        return create(self, name, content)

    monkeypatch.setattr(Place, "create", second)
    assert _run(place, images).plan.planned.startswith("first ")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith("plan")) == sorted(
        [PLAN, read_plan(place).folder]
    )


def test_into_a_bucket_and_from_it(images, whole, tmp_path):
    with s3_server("jobs") as store:
        for path in images.iterdir():
            store.put(str(path), f"jobs/in/{path.name}")
        store.pipe("jobs/in/deeper/one.png", b"")
        place = Place("s3://jobs/out/m-1")
        with pytest.raises(KeyboardInterrupt):
            _run(place, "s3://jobs/in", Brightness(8), cache=tmp_path / "cache")
        assert Place("s3://jobs/out/m-1").names("done") == ["part-000000.json"]
        second = Brightness()
        result = _run(place, "s3://jobs/in", second, cache=tmp_path / "cache")
        assert 8 + second.seen <= len(whole[0]) + 3
        assert result.resumed == 6
        rows = _rows(place)
        assert rows[0] == whole[0]
        without_path = [{**row, "path": "", "message": ""} for row in whole[1]]
        assert [row["image_id"] for row in rows[1]] == [row["image_id"] for row in without_path]
        assert not place.create(PLAN, b"{}")
        assert place.create("new.json", b"{}")
        table = pads.dataset("jobs/out/m-1/instances", filesystem=store).to_table()
        assert table["score"].to_pylist() == [row["score"] for row in whole[0]]
        glob = open_listing("s3://jobs/in/**/*.png")
        expected = sorted(f"s3://jobs/{p}" for p in ["in/deeper/one.png", *(f"in/{p.name}" for p in images.glob("*.png"))])
        assert _paths(glob) == expected
        assert _paths(glob, 5, expected[4]) == expected[5:]
        assert _paths(open_listing("s3://jobs/in/deeper/one.png")) == ["s3://jobs/in/deeper/one.png"]
        # As fsspec takes it: without another sign it is a letter.
        store.pipe("jobs/in/odd?.png", b"")
        store.pipe("jobs/in/odd1.png", b"")
        assert _paths(open_listing("s3://jobs/in/odd?.png")) == ["s3://jobs/in/odd?.png"]
        assert len(_paths(open_listing("s3://jobs/in/od*?.png"))) == 2
        store.rm(["jobs/in/odd?.png", "jobs/in/odd1.png"])
        with pytest.raises(OutputError, match=r"s3://absent/out: cannot be used \(.*\); what is done is kept, call again"):
            _run(Place("s3://absent/out"), "s3://jobs/in", cache=tmp_path / "cache")
        for nothing in ("s3://jobs/nothing", "s3://absent/x"):
            with pytest.raises(DataError, match=f"{nothing}: no such file or folder"):
                _paths(open_listing(nothing))
        parts_job.clear(place, tmp_path / "cache")
        assert store.find("jobs/out") == ["jobs/out/m-1/new.json"]


def test_a_store_that_does_not_answer_is_one_line(images, tmp_path, monkeypatch):
    place = Place("memory://out/m-1")
    file_system = fsspec.filesystem("memory")

    def failing(*_, **__):
        raise ConnectionError("refused")

    _run(place, images, cache=tmp_path)
    monkeypatch.setattr(type(file_system), "ls", failing)
    with pytest.raises(OutputError, match=r"memory://.*out/m-1: .*refused.*; what is done is kept, call again"):
        _run(place, images, cache=tmp_path)
    monkeypatch.undo()
    file_system.rm("/out", recursive=True)


def test_a_full_disk_is_one_line_and_nothing_is_lost(images, whole, tmp_path, monkeypatch):
    real = shards.write_shard

    def full(folder, number, *arguments, **named):
        if "part-000001" in str(folder):
            raise OSError(28, "No space left on device")
        return real(folder, number, *arguments, **named)

    monkeypatch.setattr("scoring.jobs.completing.write_shard", full)
    with pytest.raises(OutputError, match=r"No space left on device\); what is done is kept, call again"):
        _run(tmp_path / "out", images)
    monkeypatch.undo()
    assert Place(tmp_path / "out").names("done") == ["part-000000.json"]
    _run(tmp_path / "out", images)
    assert _rows(tmp_path / "out") == whole
