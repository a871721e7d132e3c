"""A job called again: leftovers of another one, shards by the million, stores that did not answer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from models.errors import DataError
from models.images import decoding as image_module
from models.instances import Instances
from pipelines.data import remote
from pipelines.data.dataset import Dataset
from pipelines.data.readers.annotations import make_sample
from pipelines.data.readers.opening import open_dataset
from scoring.jobs import manifest, retry, shards
from scoring.jobs.export import export_job
from scoring.jobs.job import run_job
from scoring.reader import Failure
from scoring.requests import JobSettings
from scoring.runners.local import LocalRunner
from tests.conftest import write_image
from tests.scoring.test_job import Brightness, _digests


@pytest.fixture
def images(tmp_path):
    """Nine small images."""
    for i in range(9):
        write_image(tmp_path / "in" / f"{i}.png", 20 + i, 30, i)
    return tmp_path / "in"


def _run(out, data, **more):
    dataset = data if hasattr(data, "samples") else open_dataset(data)
    predictor = more.pop("predictor", None) or Brightness()
    settings = JobSettings(shard_size=2, score_threshold=0.0, **{"overlays": 2, **more})
    return run_job(predictor, "m/1", dataset, out, settings=settings, progress=lambda r, *_: r)


@pytest.mark.parametrize(("runtime", "why"), [("openvino f32", r" \(its twin was made anew since\)"), ("torch", "")])
def test_a_job_of_a_twin_that_was_made_anew_says_so(images, tmp_path, runtime, why):
    settings = JobSettings(score_threshold=0.0, runtime=runtime)
    how = {"settings": settings, "progress": lambda r, *_: r}
    run_job(Brightness(), "m/1", open_dataset(images), tmp_path / "out", model="aa", **how)
    with pytest.raises(DataError, match=rf"holds a scoring with model aa, not bb{why}; name another --out"):
        run_job(Brightness(), "m/1", open_dataset(images), tmp_path / "out", model="bb", **how)
    # What runs it now is another runtime's, not a twin made anew.
    how["settings"] = JobSettings(score_threshold=0.0, runtime="openvino bf16")
    with pytest.raises(DataError, match="model aa, not bb; name another --out"):
        run_job(Brightness(), "m/1", open_dataset(images), tmp_path / "out", model="bb", **how)


def test_fresh_leaves_nothing_of_the_old_job(images, tmp_path):
    job = _run(tmp_path / "out", images)
    folder = job.folder
    for name in ("kaggle.csv", "metrics.json", ".run"):
        (folder / name).write_text("old")
    (folder / "notes.txt").write_text("mine")
    (folder / "geojson").mkdir()
    (folder / "geojson" / "0.geojson").write_text("old")
    (folder / "overlays" / "mine.txt").write_text("mine")
    old = {p.name for p in (folder / "overlays").glob("*.jpg")}
    for name in ("0.png", "1.png", "2.png", "3.png"):
        (images / name).unlink()
    _run(tmp_path / "out", images, fresh=True)
    left = {p.name for p in folder.iterdir()}
    assert not left & {"kaggle.csv", "metrics.json", ".run", "geojson"}
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "overlays" / "mine.txt").exists()
    assert not {p.name for p in (folder / "overlays").glob("*.jpg")} & (old & {"0.jpg", "1.jpg", "2.jpg", "3.jpg"})


def test_a_kill_while_the_old_job_is_cleared_is_no_matter(images, tmp_path, monkeypatch):
    job = _run(tmp_path / "out", images)
    (job.folder / "metrics.json").write_text("old")
    real, count = Path.unlink, []

    def killed(path, *arguments, **options):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", images, fresh=True)
    monkeypatch.undo()
    (images / "0.png").unlink()
    again = _run(tmp_path / "out", images)
    assert (again.resumed, again.images) == (0, 8)
    assert not (job.folder / "metrics.json").exists()


def test_an_export_of_fewer_pictures_leaves_none_of_the_others(images, tmp_path):
    job = _run(tmp_path / "out", images, overlays=9)
    assert len(list((job.folder / "overlays").glob("*.jpg"))) == 9
    (job.folder / "overlays" / "holiday.jpg").write_bytes(b"mine")
    export_job(job.folder, job.folder, {"overlays"}, most=2)
    names = {p.name for p in (job.folder / "overlays").glob("*.jpg")}
    assert len(names) == 3
    assert "holiday.jpg" in names


def _instances(image_id):
    return Instances.make(image_id, 20, 30, [[0, 0, 1, 1]], [0.5])


def test_any_number_of_shards(tmp_path):
    numbers = (0, 999_999, 1_000_000, 12_345_678)
    for number in numbers:
        shards.write_shard(tmp_path, number, [_instances("a")], seconds=1.0, timings={})
    for rubbish in (".1000001", ".old-000002", ".000003"):
        (tmp_path / manifest.SHARDS / rubbish).mkdir()
    assert shards.finished(tmp_path) == set(numbers)
    assert {p.name for p in (tmp_path / manifest.SHARDS).iterdir()} == {"000000", "999999", "1000000", "12345678"}
    assert shards.finished(tmp_path) == set(numbers)


class FlakyStore:
    """Files of a folder as objects of a store that answers only while ``up``; counts the requests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.up, self.down, self.requests = folder, True, set(), 0

    def _check(self, path):
        self.requests += 1
        if not self.up or Path(path).name in self.down:
            raise ConnectionError("no route to host")

    def info(self, path):
        self._check(path)
        return {"size": os.path.getsize(path), "ETag": Path(path).read_bytes().hex()[-40:]}

    def cat_file(self, path):
        self._check(path)
        return Path(path).read_bytes()


class Remote:
    """A file of such a store, as UPath is one."""

    def __init__(self, fs, path):
        self.fs, self.path = fs, str(path)
        self.name, self.stem, self.suffix = Path(path).name, Path(path).stem, Path(path).suffix

    def __str__(self):
        return f"flaky://{self.name}"


@pytest.fixture
def store(images, monkeypatch):
    """A store with the nine images, tried again without a pause."""
    monkeypatch.setattr(image_module, "RETRIES", (0.0,))
    return FlakyStore(images)


def _remote(store):
    local = open_dataset(store.folder)
    return replace(local, samples=tuple(replace(s, path=Remote(store, s.path)) for s in local.samples))


def test_one_failed_question_does_not_make_a_job_another(store, tmp_path):
    _run(tmp_path / "out", _remote(store))
    store.down = {"3.png"}
    again = _run(tmp_path / "out", _remote(store))
    assert again.resumed == 9
    # The other way about: unknown when the job began, known now.
    store.down = {"4.png", "5.png"}
    first = _run(tmp_path / "two", _remote(store))
    assert (first.images, first.failures) == (7, 2)
    store.down = set()
    assert _run(tmp_path / "two", _remote(store)).images == 9
    # What has changed is noticed as before.
    write_image(store.folder / "8.png", 40, 40, 99)
    with pytest.raises(DataError, match=r"other inputs: 1 images changed \(first: 8\)"):
        _run(tmp_path / "out", _remote(store))


def test_a_question_is_asked_again(store):
    calls = []
    real = store.info

    def once(path):
        calls.append(path)
        if len(calls) == 1:
            raise ConnectionError("reset by peer")
        return real(path)

    store.info = once
    assert remote.fingerprints([Remote(store, store.folder / "0.png")]) != [remote.UNREADABLE]
    assert len(calls) == 2


def test_a_store_that_answers_in_between_is_not_down(store):
    """Each file fails once: more failures than a store that is down may have, none of them many in a row."""
    files = [store.folder / f"{i}.txt" for i in range(2 * remote.MOST_FAILURES)]
    failed, real = set(), store.info

    def once_each(path):
        if path not in failed:
            failed.add(path)
            raise ConnectionError("reset by peer")
        return real(path)

    for file in files:
        file.write_text(file.name)
    store.info = once_each
    assert remote.UNREADABLE not in remote.fingerprints([Remote(store, file) for file in files])


def test_a_store_that_is_down_is_not_asked_for_ever(store):
    store.up = False
    paths = [Remote(store, store.folder / f"{i}.png") for i in range(2000)]
    assert remote.fingerprints(paths) == [remote.UNREADABLE] * 2000
    assert store.requests < 2000 + 3 * remote.MOST_FAILURES


def test_what_could_not_be_fetched_is_tried_again_and_the_rest_keeps_its_bytes(store, tmp_path):
    undisturbed = _run(tmp_path / "undisturbed", _remote(store))
    store.down = {"1.png", "6.png", "8.png"}
    first = _run(tmp_path / "out", _remote(store))
    assert (first.images, first.failures) == (6, 3)
    assert pq.read_table(first.folder / "errors.parquet").column("kind").to_pylist() == ["unreachable"] * 3
    still = Brightness()
    again = _run(tmp_path / "out", _remote(store), predictor=still)
    assert (still.seen, again.images, again.failures, again.resumed) == (0, 6, 3, 9)
    store.down = {"8.png"}
    counting = Brightness()
    again = _run(tmp_path / "out", _remote(store), predictor=counting)
    assert (counting.seen, again.images, again.failures, again.resumed) == (2, 8, 1, 7)
    store.down = set()
    again = _run(tmp_path / "out", _remote(store))
    assert (again.images, again.failures, again.resumed) == (9, 0, 8)
    assert _without_times(again.folder) == _without_times(undisturbed.folder)


def _without_times(folder):
    # What was not known of the files when the job began stands in its list of inputs.
    return {k: v for k, v in _digests(folder).items() if k not in ("inputs.parquet", "manifest.json")}


def _run_and_stop(store, out, stop, away=None):
    """A job that is interrupted at one of its results, after its store went away at another."""

    def stopping(results, *_):
        for number, result in enumerate(results):
            if number == away:
                store.up = False
            if number == stop:
                raise KeyboardInterrupt
            yield result

    settings = JobSettings(shard_size=2, score_threshold=0.0, overlays=2)
    with pytest.raises(KeyboardInterrupt):
        run_job(Brightness(), "m/1", _remote(store), out, settings=settings, progress=stopping)


def test_a_store_that_goes_away_in_the_middle_of_a_job(store, tmp_path):
    undisturbed = _run(tmp_path / "undisturbed", _remote(store))

    _run_and_stop(store, tmp_path / "out", stop=7, away=3)
    store.up = True
    again = _run(tmp_path / "out", _remote(store))
    assert (again.images, again.failures) == (9, 0)
    assert _without_times(again.folder) == _without_times(undisturbed.folder)


def test_a_stop_while_a_finished_job_is_opened_again_loses_nothing(store, tmp_path, monkeypatch):
    undisturbed = _run(tmp_path / "undisturbed", _remote(store))
    store.down = {"1.png", "6.png"}
    job = _run(tmp_path / "out", _remote(store))
    store.down = set()
    for step in range(1, 9):
        real, count = retry.write_shard, []

        def stopping(*arguments, real=real, count=count, step=step, **options):
            count.append(1)
            if len(count) == step:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(retry, "write_shard", stopping)
            try:
                _run(tmp_path / "out", _remote(store))
                break
            except KeyboardInterrupt:
                pass
    assert step > 5
    again = _run(tmp_path / "out", _remote(store))
    assert (again.images, again.failures) == (9, 0)
    assert _without_times(job.folder) == _without_times(undisturbed.folder)


def test_a_file_that_is_back_is_scored_one_that_is_gone_is_not_waited_for(images, tmp_path):
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"in/{i}.png" for i in range(9)) + "\n")
    (images / "2.png").rename(tmp_path / "away.png")
    (images / "5.png").unlink()
    first = _run(tmp_path / "out", tmp_path / "list.csv")
    assert (first.images, first.failures) == (7, 2)
    (tmp_path / "away.png").rename(images / "2.png")
    counting = Brightness()
    again = _run(tmp_path / "out", tmp_path / "list.csv", predictor=counting)
    assert (counting.seen, again.images, again.failures) == (1, 8, 1)
    assert pq.read_table(again.folder / "errors.parquet").column("kind").to_pylist() == ["missing"]


def test_other_failures_are_final(images):
    sample = open_dataset(images).samples[0]
    for kind in ("damaged", "too large", "not an image", "prediction"):
        assert not retry.can_be_tried_again(Failure("0", "0.png", kind, ""), sample)


def test_ray_is_sent_paths_that_mean_the_same_everywhere(images, monkeypatch):
    pytest.importorskip("ray", reason="Ray (the extra 'ray') is not installed")
    from scoring.runners.ray_runner import _anywhere, _as_named_here

    monkeypatch.chdir(images.parent)
    (images / "broken.png").write_bytes(b"none")
    samples = list(open_dataset("in").samples)
    assert not samples[0].path.is_absolute()
    local = [r for _, _, r in LocalRunner(Brightness()).results([samples])]
    sent = [_anywhere(s) for s in samples]
    monkeypatch.chdir("/")
    far = [r for _, _, r in LocalRunner(Brightness()).results([sent])]
    back = [_as_named_here(r, s) for r, s in zip(far, samples, strict=True)]
    monkeypatch.chdir(images.parent)
    assert [r for r in local if isinstance(r, Failure)] == [
        _as_named_here(r, s) for r, s in zip(far, samples, strict=True) if isinstance(r, Failure)
    ]
    assert sum(isinstance(r, Instances) for r in back) == 9


def test_a_manifest_of_an_earlier_release_has_planes(tmp_path, images):
    job = _run(tmp_path / "out", images)
    content = json.loads((job.folder / manifest.MANIFEST).read_text())
    del content["category"]
    (job.folder / manifest.MANIFEST).write_text(json.dumps(content))
    assert _run(tmp_path / "out", images).resumed == 9


def test_fresh_leaves_a_folder_alone_that_was_never_a_jobs(images, tmp_path):
    """A kill before the list of inputs was written leaves a claimed folder with what somebody keeps there."""
    job = _run(tmp_path / "first", images)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "metrics.json").write_text("mine")
    (folder / "geojson").mkdir()
    (folder / "geojson" / "0.geojson").write_text("mine")
    manifest.clear(folder)
    assert (folder / "metrics.json").read_text() == (folder / "geojson" / "0.geojson").read_text() == "mine"
    # Shards kept elsewhere: the link goes, not what it leads to.
    (tmp_path / "elsewhere" / "00000").mkdir(parents=True)
    (job.folder / "shards").symlink_to(tmp_path / "elsewhere")
    manifest.clear(job.folder)
    assert not (job.folder / "shards").is_symlink()
    assert (tmp_path / "elsewhere" / "00000").is_dir()


def test_what_cannot_be_cleared_is_said(images, tmp_path, monkeypatch):
    job = _run(tmp_path / "out", images)
    (job.folder / "shards").mkdir()

    def failing(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or failing(path))
    with pytest.raises(OSError, match="Permission denied"):
        manifest.clear(job.folder)


def test_shards_that_were_tried_again_before_a_stop_are_kept(store, tmp_path):
    store.down = {"1.png", "6.png"}
    _run(tmp_path / "out", _remote(store))
    store.down = set()

    _run_and_stop(store, tmp_path / "out", stop=1)
    counting = Brightness()
    again = _run(tmp_path / "out", _remote(store), predictor=counting)
    assert (counting.seen, again.images, again.failures) == (1, 9, 0)


def test_a_missing_file_that_is_still_gone_is_not_tried_again(tmp_path, monkeypatch):
    gone = make_sample("a", tmp_path / "a.png", (0, 0), "a", [], truth=False)
    monkeypatch.setattr(retry, "totals_of", lambda folder: object())
    monkeypatch.setattr(retry.parquet, "read_failures", lambda path: [Failure("a", "a.png", "missing", "")])
    dataset = Dataset("d", tmp_path, "all", "plane", (gone,))
    manifest = SimpleNamespace(shard_size=4)
    assert retry.failed_before(tmp_path, manifest, dataset) == {}
    (tmp_path / "a.png").touch()
    assert retry.failed_before(tmp_path, manifest, dataset) == {0: [0]}
