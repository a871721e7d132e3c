"""Ctrl-C, a kill, an error: whatever stops a training, what is on disk is of one step, and it goes on to the same end."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from models.errors import ModelError, OutputError
from pipelines.steps.cli_support import ProgressListener
from pipelines.training import loop
from pipelines.training.checkpoints import best_path, read_best, write_atomically
from pipelines.training.loop import CHECKPOINT, Interrupt, run
from tests.pipelines.test_loop import _Batches, _job, _Stop


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as a terminal gives it: a suite started in the background inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _pressing(job, at, times=1):
    """The job with Ctrl-C pressed inside a step, before its gradients are taken."""
    plain, steps = job.loss, iter(range(1, 1000))

    def loss(model, batch, device):
        for _ in range(times if next(steps) == at else 0):
            signal.raise_signal(signal.SIGINT)
        return plain(model, batch, device)

    job.loss = loss
    return job


def _saved(folder):
    return torch.load(folder / CHECKPOINT, weights_only=True)


def _ends_the_same(folder, whole):
    resumed = run(_job(folder))
    assert resumed.history == whole.history
    assert all(torch.equal(v, whole.weights[k]) for k, v in resumed.weights.items())


def test_ctrl_c_inside_a_step_is_held_back_until_it_is_whole(tmp_path):
    whole = run(_job(tmp_path / "whole"))
    notified = []

    class Telling(_Stop):
        def on_interrupt(self):
            notified.append("stopping")

    with pytest.raises(KeyboardInterrupt):
        run(_pressing(_job(tmp_path / "cut", Telling(None)), at=7))
    assert notified == ["stopping"]
    saved = _saved(tmp_path / "cut")
    # The step that it came in is done: weights, optimiser and history are of seven steps.
    assert saved["step"] == 7
    assert {int(s["step"]) for s in saved["optimizer"]["state"].values()} == {7}
    assert len(loop.json.loads(saved["history"])) == 7
    _ends_the_same(tmp_path / "cut", whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(tmp_path):
    whole = run(_job(tmp_path / "whole"))
    listener = _Stop(None)
    with pytest.raises(KeyboardInterrupt):
        run(_pressing(_job(tmp_path / "cut", listener), at=7, times=2))
    assert _saved(tmp_path / "cut")["step"] == 4
    assert listener.checkpoints == [4]
    _ends_the_same(tmp_path / "cut", whole)


def test_a_second_ctrl_c_between_two_steps_saves_nothing_either(tmp_path):
    class Twice(_Stop):
        def on_step(self, record):
            for _ in range(2 if record["step"] == 7 else 0):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(_job(tmp_path, Twice(None)))
    assert _saved(tmp_path)["step"] == 4


def test_processes_that_make_batches_leave_ctrl_c_alone():
    """A terminal sends it to them too; the step that is held back for may still need its batch."""
    batches = iter(loop.step_loader(_Batches(), 0, 12, 1))
    first = next(batches)
    os.kill(batches._workers[0].pid, signal.SIGINT)
    assert len([first, *batches]) == 12


def test_processes_that_make_batches_change_no_result(tmp_path):
    alone, helped = (run(_job(tmp_path / str(n), workers=n)) for n in (0, 2))
    assert helped.history == alone.history
    assert all(torch.equal(v, helped.weights[k]) for k, v in alone.weights.items())


@pytest.mark.parametrize("place", ["optimiser", "loss", "evaluation", "saving"])
def test_an_interrupt_from_elsewhere_saves_no_torn_step(place, tmp_path, monkeypatch):
    """Such as one of a notebook, or in a thread: it comes as an exception, anywhere."""
    scores = {"evaluate": lambda model: {"m": 0.5}, "evaluate_every": 2}
    whole = run(_job(tmp_path / "whole", **scores))
    job = _job(tmp_path / "cut", **scores)
    calls = iter(range(1000))

    def raising(function, at):
        def wrapped(*arguments, **options):
            if next(calls) == at:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return wrapped

    if place == "optimiser":
        # After the weights of half the parameters have moved.
        real = torch.optim.AdamW.step

        def half(self, *arguments, **options):
            real(self, *arguments, **options)
            if next(calls) == 6:
                raise KeyboardInterrupt

        monkeypatch.setattr(torch.optim.AdamW, "step", half)
    elif place == "loss":
        job.loss = raising(job.loss, 6)
    elif place == "evaluation":
        job.evaluate = raising(job.evaluate, 2)
    else:
        monkeypatch.setattr(loop.torch, "save", raising(torch.save, 3))
    with pytest.raises(KeyboardInterrupt):
        run(job)
    monkeypatch.undo()
    saved = _saved(tmp_path / "cut")
    history = loop.json.loads(saved["history"])
    assert len(history) == saved["step"]
    assert {int(s["step"]) for s in saved["optimizer"]["state"].values()} == {saved["step"]}
    resumed = run(_job(tmp_path / "cut", **scores))
    assert resumed.history == whole.history
    assert all(torch.equal(v, whole.weights[k]) for k, v in resumed.weights.items())


def test_a_second_ctrl_c_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    job, real = _pressing(_job(tmp_path), at=7), torch.save

    def save(content, handle):
        real(content, handle)
        if content.get("step") == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert _saved(tmp_path)["step"] == 4
    assert not list(tmp_path.glob(".*.tmp"))


def test_it_is_said_what_a_stop_costs(capfd):
    progress = ProgressListener("planes-det")
    assert progress.stopped() == "Stopped; the same command goes on from the last checkpoint."
    progress.on_start([{}] * 4, 20)
    for step in (5, 6):
        progress.on_step({"step": step, "train/loss": 0.5})
    progress.on_interrupt()
    stderr = capfd.readouterr().err
    assert "planes-det: stops when this step is done and saved" in stderr
    assert "Ctrl-C again stops at once and loses 2 steps and the one it is in" in stderr
    assert progress.stopped() == "Stopped; the same command goes on from step 4; 2 steps after it not saved."
    progress.on_checkpoint([{}] * 6)
    assert progress.stopped() == "Stopped; the same command goes on from step 6."


def test_elsewhere_than_in_the_main_thread_ctrl_c_is_left_alone():
    made = []
    thread = threading.Thread(target=lambda: made.append(Interrupt()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    made[0].check()


def _killed_before(monkeypatch, step):
    """As by kill -9 after the best weights of a step are written, before its checkpoint is."""
    real = loop._save

    def save(job, machine, state):
        if state["step"] == step:
            raise SystemError("killed")
        real(job, machine, state)

    monkeypatch.setattr(loop, "_save", save)


def test_killed_between_best_weights_and_checkpoint_it_ends_with_the_best_of_its_own_steps(tmp_path, monkeypatch):
    def scores(values):
        return {"evaluate": lambda model: {"m": next(values)}, "evaluate_every": 4}

    whole = run(_job(tmp_path / "whole", **scores(iter([0.5, 0.9, 0.1, 0.1, 0.1]))))
    assert whole.step == 8
    _killed_before(monkeypatch, 8)
    with pytest.raises(SystemError):
        run(_job(tmp_path / "cut", **scores(iter([0.5, 0.9]))))
    monkeypatch.undo()
    fourth = _saved(tmp_path / "cut")["model"]
    # Gone on with on a machine whose figures differ a little, step 8 is not the best any more.
    resumed = run(_job(tmp_path / "cut", **scores(iter([0.4, 0.1, 0.1, 0.1]))))
    assert (resumed.step, resumed.best) == (4, 0.5)
    assert all(torch.equal(v, fourth[k]) for k, v in resumed.weights.items())
    assert [p.name for p in (tmp_path / "cut").glob("best*")] == ["best-4.pt"]


def test_the_weights_returned_are_those_of_the_best_step(tmp_path, monkeypatch):
    seen = {}

    def evaluate(model):
        step = 4 * (len(seen) + 1)
        seen[step] = {k: v.clone() for k, v in model.state_dict().items()}
        return {"m": {4: 0.5, 8: 0.9}.get(step, 0.1)}

    outcome = run(_job(tmp_path, evaluate=evaluate, evaluate_every=4))
    assert outcome.step == 8
    assert all(torch.equal(v, seen[8][k]) for k, v in outcome.weights.items())


def test_best_weights_that_are_lost_are_told_when_it_goes_on(tmp_path):
    scores = {"evaluate": lambda model: {"m": 0.5}, "evaluate_every": 4}
    with pytest.raises(SystemError):
        run(_job(tmp_path, _Stop(at=10), **scores))
    best_path(tmp_path, 4).unlink()
    with pytest.raises(ModelError, match=r"the weights of its best step 4 cannot be read.*--fresh"):
        run(_job(tmp_path, **scores))


def test_best_weights_of_0_6_0_are_found_under_their_old_name(tmp_path):
    values = iter([0.9, 0.1, 0.1, 0.1, 0.1])
    scores = {"evaluate": lambda model: {"m": next(values)}, "evaluate_every": 4}
    with pytest.raises(SystemError):
        run(_job(tmp_path, _Stop(at=10), **scores))
    expected = read_best(tmp_path, 4)
    best_path(tmp_path, 4).rename(tmp_path / "best.pt")
    outcome = run(_job(tmp_path, **scores))
    assert outcome.step == 4
    assert all(torch.equal(v, expected[k]) for k, v in outcome.weights.items())


def test_a_validation_that_measured_nothing_is_beaten_by_any(tmp_path):
    values = iter([{}, {"m": 0.0}, {"m": -1.0}, {}, {}])
    outcome = run(_job(tmp_path, evaluate=lambda model: next(values), evaluate_every=4))
    assert (outcome.step, outcome.best) == (8, 0.0)


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    real = torch.save

    def save(content, handle):
        if content.get("step") == 8:
            handle.write(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        real(content, handle)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OutputError, match=r"checkpoint\.pt: cannot be written.*is the disk full\?"):
        run(_job(tmp_path))
    assert _saved(tmp_path)["step"] == 4
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each has a temporary file of its own; the last one stands, whole."""
    errors = []

    def write(number):
        try:
            for _ in range(20):
                write_atomically({"n": torch.full((1000,), number)}, tmp_path / "x.pt")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(torch.load(tmp_path / "x.pt", weights_only=True)["n"].tolist())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
