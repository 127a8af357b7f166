"""Tests between runs, on scipy: paired over seeds where seeds pair, Welch elsewhere; Holm, TOST, bootstrap.

Runs are a `Series` of one metric, indexed by what pairs them (seed, split); summaries are `Summary(mean, std, n)`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.05
DRAWS = 10_000  # of the bootstrap over runs within tasks
FLOOR = 0.005  # half a point: narrower intervals, as of cells without spread, are taken to be this wide


class Summary(NamedTuple):
    """Mean, sample standard deviation and number of runs, where they are known."""

    mean: float
    std: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Difference:
    """Of two sets of runs: mean of a − b, its 95 % interval, n (pairs, or runs of a), p of a t-test and of Wilcoxon's.

    A p-value is None where it is not defined: fewer than two runs, or no spread.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float | None
    wilcoxon: float | None
    paired: bool


def pairs(a: pd.Series[Any], b: pd.Series[Any]) -> pd.Series[Any] | None:
    """The differences a − b of the runs that share their index; None where fewer than two do."""
    common = a.index.intersection(b.index)
    return a[common] - b[common] if len(common) >= 2 else None


def difference(a: pd.Series[Any], b: pd.Series[Any]) -> Difference:
    """Paired t and Wilcoxon's signed ranks (Biometrics 1945) where seeds pair, else Welch's t.

    With five pairs, Wilcoxon's p cannot fall below 1/16.
    """
    paired = pairs(a, b)
    if paired is not None:
        mean, spread = float(paired.mean()), _spread(paired)
        if not spread:
            return Difference(mean, mean, mean, len(paired), None, None, True)
        test = stats.ttest_1samp(paired, 0)
        rank = _signed_rank_p(tuple(paired))
    else:
        mean, rank = float(a.mean() - b.mean()), None
        if min(len(a), len(b)) < 2 or not (_spread(a) or _spread(b)):
            return Difference(mean, mean, mean, len(a), None, None, False)
        test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(1 - LEVEL)
    n = len(a) if paired is None else len(paired)
    return Difference(mean, float(low), float(high), n, float(test.pvalue), rank, paired is not None)


@functools.cache  # a page and its tables ask for the same ones
def _signed_rank_p(numbers: tuple[float, ...]) -> float:
    numbers = tuple(np.round(numbers, 9))  # accuracies are k / N: equal differences of them differ by rounding
    sizes = np.abs(numbers)
    ties = len(np.unique(sizes)) < len(sizes) or not sizes.all()
    return float(stats.wilcoxon(numbers, method="auto" if ties else "exact").pvalue)


def _spread(numbers: pd.Series[Any]) -> float:
    """The standard deviation; 0 where only rounding tells the numbers apart."""
    return 0.0 if np.ptp(numbers) <= 1e-12 else float(numbers.std(ddof=1))


def tost(a: pd.Series[Any], b: pd.Series[Any], margin: float) -> float | None:
    """Equivalence: two one-sided t-tests of |a − b| < margin (Schuirmann, J. Pharmacokinet. Biopharm. 1987).

    Paired where seeds pair, else Welch's. Without spread the answer is certain: 0 within the margin, 1 outside.
    """
    paired = pairs(a, b)
    if paired is not None:
        if not _spread(paired):
            return float(abs(paired.mean()) >= margin)
        above = stats.ttest_1samp(paired, -margin, alternative="greater")
        below = stats.ttest_1samp(paired, margin, alternative="less")
    else:
        if min(len(a), len(b)) < 2:
            return None
        if not (_spread(a) or _spread(b)):
            return float(abs(a.mean() - b.mean()) >= margin)
        above = stats.ttest_ind(a + margin, b, equal_var=False, alternative="greater")
        below = stats.ttest_ind(a - margin, b, equal_var=False, alternative="less")
    return float(max(above.pvalue, below.pvalue))


def holm(p_values: Iterable[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (Scand. J. Statist. 1979): p below 0.05 keeps the error over all tests below 0.05.

    The i-th smallest of m becomes the largest of (m − j + 1) p_j over j ≤ i, at most 1. None stays and does not count.
    """
    given = list(p_values)
    order = sorted((p, i) for i, p in enumerate(given) if p is not None)
    adjusted, highest = [*given], 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean over cells, 9,999 resamples (Efron, Ann. Statist. 1979), always the same.

    NaN for fewer than six cells: of two to five it would cover the mean in 50 to 85 of 100 cases, not in 95.
    """
    if len(values) < 6:
        return math.nan, math.nan
    values = sorted(values)  # the draws are by place
    found = stats.bootstrap((values,), np.mean, confidence_level=1 - LEVEL, method="percentile", random_state=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


class Estimate(NamedTuple):
    """A value and its 95 % interval, NaN where a task has a single run."""

    value: float
    low: float
    high: float


def interquartile_mean(tasks: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the middle half of all runs of all tasks, each a sequence of runs (Agarwal et al., NeurIPS 2021).

    Beside the mean it ignores outliers, beside the median it is more certain.
    """

    def statistic(*samples: Any, axis: int = -1) -> Any:
        return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    return _stratified_bootstrap(statistic, tasks)


def probability_of_improvement(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Estimate:
    """P(X > Y): how often a run of a is above one of b in the same task, ties half, mean over tasks.

    That is Mann and Whitney's U / (n_x n_y) (Agarwal et al., NeurIPS 2021). 0.5: neither is better. Runs do not pair.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} tasks against {len(b)}: both must have runs of the same tasks")

    def statistic(*samples: Any, axis: int = -1) -> Any:  # each (..., n)
        xs, ys = samples[: len(a)], samples[len(a) :]
        above = [np.sign(x[..., :, None] - y[..., None, :]).mean(axis=(-2, -1)) for x, y in zip(xs, ys, strict=True)]
        return (1 + np.mean(above, axis=0)) / 2

    return _stratified_bootstrap(statistic, [*a, *b])


def _stratified_bootstrap(statistic: Callable[..., Any], samples: Sequence[Sequence[float]]) -> Estimate:
    """The statistic and its 95 % percentile interval, runs drawn anew within each sample; always the same draws."""
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    value = float(statistic(*arrays))
    if min(map(len, arrays)) < 2:
        return Estimate(value, math.nan, math.nan)
    found = stats.bootstrap(
        arrays, statistic, n_resamples=DRAWS, batch=1000, vectorized=True, confidence_level=1 - LEVEL,
        method="percentile", random_state=0,
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(found.low), float(found.high))


def agreement(ours: Summary, theirs: Summary) -> tuple[float | None, float | None]:
    """Could a number from elsewhere be of these runs: p, and half its 95 % interval's width; None without a spread.

    Two means of the same experiment differ by less than t·√(s²/n + s'²/n') in 95 of 100 cases. A source without s' is
    taken to have our spread, and one without n' as many runs as ours; degrees of freedom: n − 1, with s' Welch's.
    The number agrees when it lies within, or within FLOOR: cells that collapse to one class have no spread at all.
    """
    if ours.std is None or pd.isna(ours.std) or ours.n is None or ours.n < 2:
        return None, None
    m = theirs.n or ours.n
    own, other = ours.std**2 / ours.n, (ours.std if theirs.std is None else theirs.std) ** 2 / m
    degrees = float(ours.n - 1)
    if theirs.std is not None and own + other > 0:
        degrees = (own + other) ** 2 / (own**2 / (ours.n - 1) + other**2 / max(m - 1, 1))
    error = math.sqrt(own + other)
    p = 2 * float(stats.t.sf(abs(ours.mean - theirs.mean) / error, degrees)) if error > 1e-12 else None
    return p, max(FLOOR, float(stats.t.ppf(1 - LEVEL / 2, degrees)) * error)
