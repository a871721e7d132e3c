"""Repeated measurements: mean and standard deviation, and whether two groups of them differ beyond their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Two groups differ where chance alone would part their means so far in less than one of twenty cases.
LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample, NaN of a single value) of ``count`` measurements."""

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of the finite values; NaN without any."""
        known = [v for v in values if math.isfinite(v)]
        if not known:
            return cls(math.nan, math.nan, 0)
        return cls(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else math.nan, len(known))

    def __str__(self) -> str:
        """Such as ``0.453 ± 0.012 (3)``."""
        if not self.count:
            return "-"
        return f"{self.mean:.3f}" + (f" ± {self.sd:.3f} ({self.count})" if self.count > 1 else "")


@dataclass(frozen=True)
class Difference:
    """Second mean minus first mean with its interval at `LEVEL`; NaN bounds where the noise is unknown."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``beyond the noise``, ``inside the noise``, or ``noise unknown`` where nothing was repeated."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "noise unknown"
        return "inside the noise" if self.low <= 0 <= self.high else "beyond the noise"

    def __str__(self) -> str:
        """Such as ``+0.012 [-0.004, +0.028]: inside the noise``."""
        if not math.isfinite(self.value):
            return "-"
        interval = f" [{self.low:+.3f}, {self.high:+.3f}]" if math.isfinite(self.low) else ""
        return f"{self.value:+.3f}{interval}: {self.verdict}"


def difference(first: Mapping[str, float], second: Mapping[str, float], *, folds: int = 0) -> Difference:
    """How two groups of measurements differ, each value named by what was repeated.

    Of seeds: Welch's interval of the two means. A single measurement against several is taken to be as noisy as these
    are. With ``folds`` the names are those of folds, the value of each the mean over its seeds: folds that both groups
    have are paired, as two recipes meet the same scenes, and the others left out. Since the trainings share most of
    their images, the variance of the mean is 1 / n + 1 / (folds - 1) of that of the differences instead of 1 / n
    (Nadeau and Bengio, Machine Learning 52, 2003). Values without any spread say nothing of the noise, unless they are
    equal.
    """
    a, b = ({k: v for k, v in group.items() if math.isfinite(v)} for group in (first, second))
    if not a or not b:
        return Difference(math.nan, math.nan, math.nan)
    if folds > 1:
        return _paired([b[k] - a[k] for k in a if k in b], folds)
    value = float(np.mean(list(b.values())) - np.mean(list(a.values())))
    if max(len(a), len(b)) < 2:
        return Difference(value, math.nan, math.nan)
    if min(len(a), len(b)) < 2:
        several = list((a if len(a) > 1 else b).values())
        return _around(value, float(np.var(several, ddof=1)) * (1 + 1 / len(several)), len(several) - 1)
    shares = [(float(np.var(list(g.values()), ddof=1)) / len(g), len(g) - 1) for g in (a, b)]
    total = sum(share for share, _ in shares)
    # Welch and Satterthwaite's degrees of freedom.
    freedom = total**2 / sum(share**2 / f for share, f in shares) if total else 1.0
    return _around(value, total, freedom)


def _paired(each: Sequence[float], folds: int) -> Difference:
    if not each:
        return Difference(math.nan, math.nan, math.nan)
    value = float(np.mean(each))
    if len(each) < 2:
        return Difference(value, math.nan, math.nan)
    return _around(value, float(np.var(each, ddof=1)) * (1 / len(each) + 1 / (folds - 1)), len(each) - 1)


def _around(value: float, variance: float, freedom: float) -> Difference:
    """A difference with the interval of Student's t; without any variance of its own only where it is none."""
    if variance <= 1e-18 and value:
        return Difference(value, math.nan, math.nan)
    margin = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Difference(value, value - margin, value + margin)
