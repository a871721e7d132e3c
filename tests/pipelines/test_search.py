"""A search over settings: ranges and choices, what was tried is not tried again, the poor are stopped early."""

from __future__ import annotations

import sys

import pytest

from models.errors import EngineMissing, RecipeError
from pipelines.training.loop import Stopped
from pipelines.use_cases import search
from pipelines.use_cases.ablate import AblationRequest
from pipelines.use_cases.search import PRUNED, Dimension, plan_search, search_planned
from tests.stores import working_in

TINY = ("training.steps=4", "training.batch_size=2", "training.evaluate_every=2", "data.val_fraction=0.3")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A store in the working folder."""
    with working_in(tmp_path_factory.mktemp("search")) as registry:
        yield registry


def _request(airfield, **changes):
    settings = {"recipe": "demo_unet", "name": "tuned", "overrides": TINY, "device": "cpu", "search": 3}
    settings |= {"grid": ("lr=0.0005..0.005 loss=bce,bce_dice",)}
    return AblationRequest(data=str(airfield), work_dir="work", **{**settings, **changes})


@pytest.mark.parametrize("entry", ["lr=2..1", "lr=a..b", "lr=1..1", "=1..2", "lr=..2"])
def test_ranges_that_are_none_are_said(entry):
    with pytest.raises(RecipeError, match=r"expected key=low\.\.high"):
        Dimension.parse(entry)


def test_mistakes_are_said_before_anything_is_trained(airfield, monkeypatch):
    with pytest.raises(RecipeError, match="--search goes through --grid"):
        plan_search(_request(airfield, grid=()))
    with pytest.raises(RecipeError, match=r"did you mean 'optimizer\.lr'"):
        plan_search(_request(airfield, grid=("optimizer.lrr=0.1..1",)))
    with pytest.raises(RecipeError, match=r"not the test set: data\.val_fraction above 0, or --folds"):
        plan_search(_request(airfield, overrides=(*TINY, "data.val_fraction=0")))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(EngineMissing, match="--search needs Optuna: pip install optuna"):
        plan_search(_request(airfield))


@pytest.mark.slow
def test_trials_are_children_and_none_is_run_twice(registry, airfield, monkeypatch):
    studies, made, real, values = [], search._study, search._value, iter([0.2, 0.5, 0.3])
    read = []
    # Trainings of four steps all reach 0.
    monkeypatch.setattr(search, "_value", lambda results, plan: read.append(real(results, plan)) or next(values, 0.1))
    monkeypatch.setattr(search, "_study", lambda: studies.append(made()) or studies[-1])
    first = search_planned(registry, plan_search(_request(airfield)))
    # What Optuna is told is what each trial reached on validation, to be made large.
    assert read == [r.run.data.metrics["val/best_IoU"] for r in first]
    assert ([t.value for t in studies[-1].trials], studies[-1].best_value) == ([0.2, 0.5, 0.3], 0.5)
    assert len({r.variant for r in first}) == 3
    for result in first:
        given = dict(o.split("=") for o in result.variant.overrides)
        assert 0.0005 <= float(given["lr"]) <= 0.005
        assert result.run.data.params["optimizer.lr"] == str(float(given["lr"]))
        assert result.run.data.params["loss"] == given["loss"]
    monkeypatch.setattr("pipelines.use_cases.ablate.run_plan", _refused(1))
    values = iter([0.2, 0.5, 0.3])
    longer = search_planned(registry, plan_search(_request(airfield, search=4)))
    # The first three come again from their runs; only the fourth is new, and fails here.
    assert [r.run.info.run_id for r in longer[:3]] == [r.run.info.run_id for r in first]
    assert longer[3].error == "refused"
    parents = {registry.client.get_run(r.run.info.run_id).data.tags["mlflow.parentRunId"] for r in longer[:3]}
    assert len(parents) == 1


def _refused(times):
    calls = []

    def run(*_):
        calls.append(1)
        assert len(calls) <= times, "a trial that is done was trained again"
        raise RecipeError("refused")

    return run


@pytest.mark.slow
def test_a_trial_that_is_behind_is_stopped_and_stays_stopped(registry, airfield, monkeypatch):
    monkeypatch.setattr(search, "FIRST", 1)
    values = iter([0.9, 0.95, 0.1, 0.1])
    real = search._Judge._tell

    def judged(self, record):
        if self.metric in record and record["step"] > self.step:
            record = {**record, self.metric: fake.setdefault((self.trial.number, record["step"]), next(values, 0.0))}
        return real(self, record)

    fake = {}
    monkeypatch.setattr(search._Judge, "_tell", judged)
    request = _request(airfield, search=2, name="pruned", grid=("lr=0.0001..0.009",))
    results = search_planned(registry, plan_search(request))
    assert [r.error for r in results] == ["", "stopped at step 2"]
    run = registry.client.get_run(results[1].run.info.run_id)
    assert (run.info.status, run.data.tags[PRUNED]) == ("FINISHED", "2")
    again = search.search(registry, request)
    assert [r.run.info.run_id for r in again] == [r.run.info.run_id for r in results]


def test_a_listener_s_stop_is_no_failure_of_its_own():
    trial = type("T", (), {"report": lambda self, v, s: None, "should_prune": lambda self: True})()
    judge = search._Judge(trial, "val/IoU")
    judge.on_step({"step": 1})
    judge.on_step({"step": 2, "val/IoU": float("nan")})
    with pytest.raises(Stopped, match="step 3"):
        judge.on_step({"step": 3, "val/IoU": 0.1})
