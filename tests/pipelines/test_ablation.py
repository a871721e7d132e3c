"""Variants of an ablation, its table and its chart."""

from dataclasses import replace

import numpy as np
import pytest
from mlflow.entities import Metric, Run, RunData, RunInfo

from models.errors import RecipeError
from pipelines.ablation import (
    Member,
    Result,
    Variant,
    as_csv,
    best_variant,
    compared_by,
    deciding_metric,
    make_variants,
    result_rows,
)
from pipelines.evaluation.figures import ablation_figure


@pytest.mark.parametrize(
    ("grid", "listed", "message"),
    [
        ([], [], "give either"),
        (["lr=1,2"], ["lr=1; lr=2"], "give either"),
        (["lr=1,"], [], "expected key=value,value"),
        (["lr"], [], "expected key=value,value"),
        (["lr=1"], [], "at least two"),
        (["lr=1,1"], [], "are equal"),
    ],
)
def test_mistakes_are_named(grid, listed, message):
    with pytest.raises(RecipeError, match=message):
        make_variants(grid, listed)


def test_lists_are_one_value():
    made = make_variants(["architecture.anchor_sizes=[[8,16],[32,64]],[[16,32],[64,128]]"], [])
    assert [v.overrides[0].partition("=")[2] for v in made] == ["[[8,16],[32,64]]", "[[16,32],[64,128]]"]


def _result(label, **metrics):
    info = RunInfo("r" + label, "1", "user", "FINISHED", 0, 1, "active")
    logged = [Metric(k.replace("__", "/"), v, 0, 0) for k, v in metrics.items()]
    return Result(Variant((f"optimizer.lr={label}",)), Run(info, RunData(metrics=logged)))


def test_the_table_has_what_the_runs_have_and_says_what_failed():
    results = [
        _result("1", test__AP=0.5, test__AP50=0.75, wall_seconds=9.0),
        Result(Variant(("optimizer.lr=2",)), None, "nan"),
    ]
    metric = deciding_metric(results, "AP")
    assert metric == "test/AP"
    rows = result_rows(results, metric)
    assert (rows[0]["optimizer.lr"], rows[0]["test/AP"], rows[0]["test/AP50"], rows[0]["run_id"]) == ("1", 0.5, 0.75, "r1")
    assert np.isnan(rows[1]["test/AP"])
    assert rows[1]["error"] == "nan"
    lines = as_csv(rows).splitlines()
    assert lines[0].startswith("variant,optimizer.lr,test/AP,test/AP50")
    assert lines[2].startswith("lr=2,2,,")
    folds = [replace(_result("1", val__best_AP=0.9, test__AP=0.4), member=Member(0, 1, 2))]
    assert deciding_metric(folds, "AP") == "test/AP"
    both = [_result("1", val__best_AP=0.2, test__AP=0.4)]
    assert deciding_metric(both, "AP") == "val/best_AP"
    assert result_rows(both, "val/best_AP")[0]["test/AP"] == 0.4


def test_the_chart_shows_every_variant(tmp_path):
    curve = (list(range(1, 51)), list(np.exp(-np.arange(50) / 20)))
    figure = ablation_figure(
        [("lr=1", 0.4), ("lr=2", float("nan"))],
        "test/AP",
        {"lr=1": curve, "lr=2": ([], [])},
        {"lr=1": ([50], [0.3])},
        "val/AP",
    )
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == ["lr=1", "lr=2"]
    assert {t.get_text() for t in figure.axes[0].texts} == {"0.400", "failed"}
    figure.savefig(tmp_path / "a.png")
    assert len(figure.axes) == 3


def test_a_variant_that_was_spared_its_hard_folds_is_not_the_best():
    values = {"1": [0.82, 0.82, 0.22], "2": [0.8, 0.8, None]}
    results = []
    for label, numbers in values.items():
        for fold, value in enumerate(numbers, start=1):
            one = _result(label, **({} if value is None else {"test__AP": value}))
            failed = {"run": None, "error": "killed"} if value is None else {}
            results.append(replace(one, member=Member(0, fold, 3), **failed))
    assert best_variant(results, "test/AP").label == "lr=1"
    rows = result_rows(results, "test/AP")
    assert rows[0]["against the best"] == "the best"
    # Held against it by the folds that both have.
    assert rows[1]["against the best"].startswith("-0.020")
    assert rows[1]["trainings"] == 2


def test_folds_are_compared_by_their_mean_over_seeds():
    results = [
        replace(_result("1", test__AP=value), member=Member(seed, fold, 2))
        for seed, fold, value in ((0, 1, 0.1), (0, 2, 0.5), (1, 1, 0.3), (1, 2, 0.7))
    ]
    assert compared_by(results, "test/AP") == {"fold 1": pytest.approx(0.2), "fold 2": pytest.approx(0.6)}
    seeds = [replace(_result("1", test__AP=v), member=Member(s)) for s, v in ((0, 0.1), (1, 0.3))]
    assert compared_by(seeds, "test/AP") == {"seed 0": 0.1, "seed 1": 0.3}
