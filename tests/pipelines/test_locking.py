"""Two processes that want the same folder: one works, the other waits or is told; what was cut short is made whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from models.errors import DataError, OutputError, PlanesError
from pipelines.data.loading.tiles import TileSettings, cached_tiles, cut_tiles
from pipelines.data.readers.opening import open_dataset
from pipelines.data.synthetic import scenes
from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield

TINY = AirfieldSettings(train=1, test=1, size=256, planes_min=2, planes_max=3)

HOLD = """
import sys, time
from pathlib import Path
from pipelines.locking import held, lock_of
with held(lock_of(Path(sys.argv[1])), "an equal training of planes-det"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(root, tmp_path):
    """Another process that holds the folder ``tmp_path/run``."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], env=environment, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def _plan(folder):
    request = SimpleNamespace(register_as="planes-det", fresh=True, task="unet", label="", scores_from=None)
    return SimpleNamespace(folder=folder, request=request, key="0")


def test_an_equal_training_is_told_who_holds_its_folder_and_touches_nothing(holder, tmp_path):
    from pipelines.use_cases.training import run_plan

    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("of the other one")
    said = rf"run: held by an equal training of planes-det \(process {holder.pid} on .* since .*\); wait for it or stop it"
    # --fresh removes the folder; not under somebody's feet.
    with pytest.raises(PlanesError, match=said):
        run_plan(None, _plan(tmp_path / "run"))
    assert checkpoint.read_text() == "of the other one"


def test_a_lock_goes_with_its_process(holder, tmp_path):
    from pipelines.locking import held, lock_of

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(lock_of(tmp_path / "run"), "mine"):
        assert "mine" in lock_of(tmp_path / "run").read_text()
        with pytest.raises(OutputError, match="held by mine"), held(lock_of(tmp_path / "run"), "other"):
            pass
    with held(lock_of(tmp_path / "run"), "again"):
        pass
    with (
        pytest.raises(ZeroDivisionError),
        held(lock_of(tmp_path / "run"), "failing"),
    ):
        raise ZeroDivisionError
    with held(lock_of(tmp_path / "run"), "after a failure"):
        pass


def test_a_lock_that_cannot_be_written_is_told(tmp_path):
    from pipelines.locking import held, lock_of

    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be locked"), held(lock_of(tmp_path / "file" / "run"), "mine"):
        pass


def test_equal_ablations_are_not_done_twice_at_once(monkeypatch, tmp_path):
    from pipelines.locking import held, lock_of
    from pipelines.use_cases import ablate

    request = ablate.AblationRequest(
        recipe="demo_unet", data="x", name="abl", device="cpu", grid=("lr=0.1,0.2",), work_dir=str(tmp_path)
    )
    plan = SimpleNamespace(key="k", recipe=SimpleNamespace(name="demo_unet", engine="torch"))
    monkeypatch.setattr(ablate, "plan_training", lambda request, data_of=None, registry=None: plan)
    monkeypatch.setattr("pipelines.ablation.ablation_key", lambda keys: "k0")
    said = "abl-k0: held by an equal ablation of abl"
    with held(lock_of(tmp_path / "abl-k0"), "an equal ablation of abl"), pytest.raises(OutputError, match=said):
        ablate.ablate(None, request)


@pytest.fixture(scope="module")
def tiles(airfield):
    return cut_tiles(open_dataset(airfield, "train"), TileSettings(size=256), 0.3)


def _plain(samples, *_):
    return samples


def _same(tiles, cached):
    for one, other in zip(tiles.samples, cached.samples, strict=True):
        assert (one.read() == other.read()).all()


def _together(work, count=2):
    """Run ``work`` in threads at once; the errors."""
    errors = []

    def call():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_preparations_of_the_same_tiles_do_not_collide(tiles, tmp_path):
    calls = []

    def meeting(samples, total, title):
        calls.append(total)
        for sample in samples:
            try:
                both.wait(0.02)
            except threading.BrokenBarrierError:
                pass
            yield sample

    both = threading.Barrier(2)
    assert not _together(lambda: cached_tiles(tiles, tmp_path / "t", meeting))
    # The second one found them done.
    assert calls == [len(tiles)]
    _same(tiles, cached_tiles(tiles, tmp_path / "t", _plain))


@pytest.mark.parametrize("damage", ["missing", "half", "empty", "index half", "index of 0.6.0", "index gone"])
def test_tiles_that_were_cut_short_are_made_again(damage, tiles, tmp_path):
    folder, made = tmp_path / "t", []
    cached = cached_tiles(tiles, folder, _plain)
    path = cached.samples[2].path
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(path.read_bytes()[:-200])
    if damage.startswith("index"):
        texts = {"half": '["a', "of 0.6.0": json.dumps([s.path.name for s in cached.samples]), "gone": None}
        text = texts[damage.removeprefix("index ")]
        (folder / "tiles.json").unlink() if text is None else (folder / "tiles.json").write_text(text)
    (folder / "left.tmp").write_text("of a call that was killed")

    def counting(samples, total, title):
        made.append(total)
        return samples

    _same(tiles, cached_tiles(tiles, folder, counting))
    assert made == [1]
    assert not list(folder.glob("*.tmp"))
    # Nothing is left to do.
    made.clear()
    cached_tiles(tiles, folder, counting)
    assert made == []


def test_images_whose_names_differ_by_a_folder_have_tiles_of_their_own(tiles, tmp_path):
    one, other = tiles.samples[:2]
    both = replace(tiles, samples=(replace(one, image_id="a/b"), replace(other, image_id="a_b")))
    _same(both, cached_tiles(both, tmp_path / "t", _plain))


def test_a_full_disk_leaves_no_half_tiles(tiles, tmp_path, monkeypatch):
    from PIL import Image

    def full(self, handle, **options):
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        with pytest.raises(DataError, match=r"tiles cannot be written .*No space left"):
            cached_tiles(tiles, tmp_path / "t", _plain)
    assert not list((tmp_path / "t").iterdir())
    _same(tiles, cached_tiles(tiles, tmp_path / "t", _plain))


def test_an_airfield_that_was_interrupted_at_any_place_is_simply_made_again(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    prepare_airfield(whole, TINY)
    real = scenes._coco
    calls = iter(range(10))

    def killed(*arguments):
        if next(calls) == 1:
            raise SystemError("killed")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(scenes, "_coco", killed)
        with pytest.raises(SystemError):
            prepare_airfield(tmp_path / "cut", TINY)
    assert (tmp_path / "cut" / "train_coco.json").exists()
    with pytest.raises(DataError, match="other settings"):
        prepare_airfield(tmp_path / "cut", replace(TINY, seed=1))
    assert prepare_airfield(tmp_path / "cut", TINY)
    files = [
        sorted((p.relative_to(f).as_posix(), p.read_bytes()) for p in f.rglob("*.*")) for f in (whole, tmp_path / "cut")
    ]
    assert files[0] == files[1]
    assert not prepare_airfield(tmp_path / "cut", TINY)


def test_of_two_airfields_at_once_one_is_made(tmp_path):
    made = []
    assert not _together(lambda: made.append(prepare_airfield(tmp_path / "a", TINY)))
    assert sorted(made) == [False, True]
    assert np.ptp(open_dataset(str(tmp_path / "a"), "train").samples[0].read()) > 0


def test_an_airfield_is_not_drawn_over_somebodys_images(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train_coco.json").write_text("{}")
    with pytest.raises(DataError, match="not empty and not an airfield"):
        prepare_airfield(tmp_path / "mine", TINY)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["train_coco.json"]
