"""Means, deviations, and differences against their noise, held to scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from pipelines.evaluation.spread import Difference, Spread, difference


def test_the_spread_of_a_sample():
    spread = Spread.of([0.4, 0.5, math.nan, 0.6])
    assert (spread.mean, spread.sd, spread.count) == (pytest.approx(0.5), pytest.approx(0.1), 3)
    assert str(spread) == "0.500 ± 0.100 (3)"
    one = Spread.of([0.4])
    assert math.isnan(one.sd)
    assert str(one) == "0.400"
    assert str(Spread.of([math.nan])) == "-"


@pytest.mark.parametrize("seed", range(5))
def test_seeds_are_held_against_each_other_as_welch_does(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.4, 0.02, 3), rng.normal(0.45, 0.05, 4)
    ours = difference({f"seed {i}": v for i, v in enumerate(a)}, {f"seed {i}": v for i, v in enumerate(b)})
    theirs = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert ours.value == pytest.approx(b.mean() - a.mean())
    assert (ours.verdict == "inside the noise") == (theirs.low <= 0 <= theirs.high)


def test_folds_are_paired_and_share_their_training_images():
    a = {f"fold {i}": v for i, v in enumerate([0.1, 0.5, 0.9, 0.3, 0.7])}
    b = {k: v + d for (k, v), d in zip(a.items(), [0.05, 0.06, 0.07, 0.05, 0.06], strict=True)}
    paired = difference(a, b, folds=5)
    each = np.array([b[k] - a[k] for k in a])
    # Nadeau and Bengio: the share of the test set over that of training is 1/4 with five folds.
    half = stats.t.ppf(0.975, 4) * np.sqrt(each.var(ddof=1) * (1 / 5 + 1 / 4))
    assert (paired.low, paired.high) == (pytest.approx(each.mean() - half), pytest.approx(each.mean() + half))
    assert paired.verdict == "beyond the noise"
    # Unpaired, the folds' own spread hides it.
    assert difference(a, b).verdict == "inside the noise"
    # A fold that one of them has not is left out, and what is left is paired still.
    del b["fold 0"]
    fewer = difference(a, b, folds=5)
    assert fewer.value == pytest.approx(each[1:].mean())
    half = stats.t.ppf(0.975, 3) * np.sqrt(each[1:].var(ddof=1) * (1 / 4 + 1 / 4))
    assert fewer.low == pytest.approx(fewer.value - half)
    assert str(difference({"fold 0": 0.1}, {"fold 1": 0.9}, folds=5)) == "-"
    assert difference({"fold 0": 0.1}, {"fold 0": 0.9}, folds=5).verdict == "noise unknown"


def test_one_measurement_is_as_noisy_as_the_others():
    several = {"1": 0.40, "2": 0.42, "3": 0.44}
    half = stats.t.ppf(0.975, 2) * 0.02 * np.sqrt(1 + 1 / 3)
    for first, second, sign in (({"x": 0.5}, several, -1), (several, {"x": 0.5}, 1)):
        found = difference(first, second)
        assert (found.value, found.low, found.high) == pytest.approx((sign * 0.08, sign * 0.08 - half, sign * 0.08 + half))


def test_what_was_done_once_says_nothing_of_noise():
    single = difference({"a": 0.1}, {"a": 0.9})
    assert single.verdict == "noise unknown"
    assert str(single) == "+0.800: noise unknown"
    assert str(difference({}, {"a": 0.9})) == "-"
    equal = difference({"1": 0.5, "2": 0.5}, {"3": 0.5, "4": 0.5})
    assert (equal.low, equal.high, equal.verdict) == (0, 0, "inside the noise")
    # Values that never differ tell nothing about how much they might.
    for first, second in (({"1": 0.5, "2": 0.5}, {"3": 0.6, "4": 0.6}), ({"1": 0.49}, {"1": 0.5, "2": 0.5})):
        assert difference(first, second).verdict == "noise unknown"
    assert difference({"f1": 0.1, "f2": 0.2}, {"f1": 0.2, "f2": 0.3}, folds=2).verdict == "noise unknown"
    assert str(Difference(0.012, -0.004, 0.028)) == "+0.012 [-0.004, +0.028]: inside the noise"
