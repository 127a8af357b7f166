"""Tests between runs: against scipy on the raw numbers, and against values worked out or printed elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from repro.report import stats
from repro.report.stats import FLOOR, Summary, agreement, bootstrap_mean, difference, holm, tost

RNG = np.random.default_rng(0)


def runs(values, first=0):
    return pd.Series([float(v) for v in values], index=range(first, first + len(values)))


def test_runs_of_the_same_seeds_are_compared_in_pairs():
    a, noise = RNG.random(5), RNG.random(5) / 100
    b = a - 0.1 + noise
    found = difference(runs(a), runs(b)[::-1])  # in any order
    expected = scipy_stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert found.paired and found.n == 5
    assert (found.mean, found.p, found.low, found.high) == pytest.approx((np.mean(a - b), expected.pvalue, low, high))
    assert found.wilcoxon == pytest.approx(scipy_stats.wilcoxon(a, b).pvalue) == 1 / 16
    assert found.p < scipy_stats.ttest_ind(a, b).pvalue


def test_only_shared_seeds_make_pairs_and_other_seeds_make_welch():
    a, b = RNG.random(5), RNG.random(3)
    found = difference(runs(a), runs(b))
    assert found.n == 3 and found.p == pytest.approx(scipy_stats.ttest_rel(a[:3], b).pvalue)
    found = difference(runs(a), runs(b, first=10))
    assert not found.paired and found.n == 5 and found.wilcoxon is None
    assert found.p == pytest.approx(scipy_stats.ttest_ind(a, b, equal_var=False).pvalue)


@pytest.mark.parametrize("b", [[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]])
def test_a_constant_difference_has_no_p(b):
    found = difference(runs([0.5, 0.6, 0.7]), runs(b))
    assert found.p is None and found.wilcoxon is None and found.low == found.high == pytest.approx(0.5 - b[0])
    assert difference(runs([0.5]), runs([0.4])).p is None


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(method = "holm")
    assert holm([0.02, None, 0.5, 0.9]) == [pytest.approx(0.06), None, 1.0, 1.0]
    assert holm([]) == []


def test_equivalence_needs_both_one_sided_tests():
    a = RNG.normal(0.5, 0.01, 8)
    b = a + RNG.normal(0.002, 0.004, 8)
    d = a - b
    one = scipy_stats.ttest_1samp(d, -0.02, alternative="greater").pvalue
    other = scipy_stats.ttest_1samp(d, 0.02, alternative="less").pvalue
    assert tost(runs(a), runs(b), 0.02) == pytest.approx(max(one, other)) and max(one, other) < 0.05
    assert tost(runs(a), runs(b), 1e-4) > 0.05  # no difference shown is not equivalence
    assert tost(runs(a), runs(b - 0.1), 0.02) > 0.95
    unpaired = tost(runs(a), runs(b, first=100), 0.02)
    above = scipy_stats.ttest_ind(a + 0.02, b, equal_var=False, alternative="greater").pvalue
    below = scipy_stats.ttest_ind(a - 0.02, b, equal_var=False, alternative="less").pvalue
    assert unpaired == pytest.approx(max(above, below))
    assert tost(runs([0.5, 0.5]), runs([0.51, 0.51]), 0.02) == 0 and tost(runs([0.5] * 2), runs([0.6] * 2), 0.02) == 1
    assert tost(runs([0.5]), runs([0.5]), 0.02) is None


def test_bootstrap_interval_of_the_mean():
    values = RNG.normal(0.1, 0.05, 40).tolist()
    low, high = bootstrap_mean(values)
    half = 1.96 * np.std(values) / math.sqrt(40)
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=half / 8)
    assert bootstrap_mean(values) == (low, high)  # the same each time
    assert all(math.isnan(x) for x in bootstrap_mean(values[:5]))  # too few for a percentile interval
    assert bootstrap_mean([0.1] * 6) == pytest.approx((0.1, 0.1))


def test_equal_differences_rank_as_equal():
    """0.3 - 0.2 and 0.2 - 0.1 are not the same number, but the same difference."""
    a, b = [0.3, 0.2, 0.6, 0.5, 0.9, 0.1], [0.2, 0.1, 0.3, 0.1, 0.4, 0.3]
    exact = scipy_stats.wilcoxon([1, 1, 3, 4, 5, -2], method="auto").pvalue
    assert difference(runs(a), runs(b)).wilcoxon == pytest.approx(exact)


def test_a_published_mean_is_compared_as_a_mean_of_as_many_runs_with_our_spread():
    p, half = agreement(Summary(0.5, 0.02, 5), Summary(0.51))
    error = 0.02 * math.sqrt(2 / 5)
    assert half == pytest.approx(scipy_stats.t.ppf(0.975, 4) * error)
    assert p == pytest.approx(2 * scipy_stats.t.sf(0.01 / error, 4))
    p, half = agreement(Summary(0.5, 0.02, 5), Summary(0.51, 0.01, 10))
    welch = scipy_stats.ttest_ind_from_stats(0.5, 0.02, 5, 0.51, 0.01, 10, equal_var=False)
    assert p == pytest.approx(welch.pvalue)
    outside = Summary(0.5 + half * 1.001, 0.01, 10)
    assert agreement(Summary(0.5, 0.02, 5), outside)[0] < 0.05 == stats.LEVEL


def test_without_a_spread_the_floor_decides_and_one_run_decides_nothing():
    assert agreement(Summary(0.1965, 0.0, 5), Summary(0.193)) == (None, FLOOR)
    assert agreement(Summary(0.5, float("nan"), 1), Summary(0.5)) == (None, None)
    assert agreement(Summary(0.5, 1e-5, 5), Summary(0.5))[1] == FLOOR


def test_ninety_five_of_a_hundred_repetitions_agree():
    inside = 0
    for _ in range(2000):
        a, b = RNG.normal(size=5), RNG.normal(size=5)
        _, half = agreement(Summary(a.mean(), a.std(ddof=1), 5), Summary(b.mean()))
        inside += abs(a.mean() - b.mean()) <= half
    assert 0.93 < inside / 2000 < 0.97


# -- over many tasks -------------------------------------------------------------------------------------------------


def test_probability_of_improvement_is_u_over_the_pairs_mean_over_tasks():
    a, b = [[0.1, 0.5, 0.5], [0.9, 0.8]], [[0.5, 0.2], [0.1, 0.2, 0.3]]
    u = [scipy_stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in zip(a, b, strict=True)]
    found = stats.probability_of_improvement(a, b)
    assert found.value == pytest.approx(np.mean(u)) == pytest.approx((3 / 6 + 1) / 2)  # 2 pairs above, 2 ties
    assert found.low <= found.value <= found.high
    assert stats.probability_of_improvement(b, a).value == pytest.approx(1 - found.value)
    assert stats.probability_of_improvement(a, a).value == 0.5
    with pytest.raises(ValueError, match="2 tasks against 1"):
        stats.probability_of_improvement(a, b[:1])


def test_the_interquartile_mean_is_that_of_the_middle_half():
    tasks = [[0.0, 1.0, 2.0, 100.0], [3.0, 4.0, 5.0, -100.0]]  # eight runs: -100, 0 and 5, 100 are left out
    found = stats.interquartile_mean(tasks)
    assert found.value == pytest.approx(np.mean([1, 2, 3, 4]))
    assert found == stats.interquartile_mean(tasks)  # the same draws each time


def test_the_bootstrap_draws_runs_within_tasks():
    """Tasks without spread have no interval, however far apart: runs do not move between tasks."""
    assert stats.interquartile_mean([[0.1] * 3, [0.9] * 3]) == pytest.approx((0.5, 0.5, 0.5))
    a = RNG.normal(0.5, 0.1, 40)
    low, high = stats.interquartile_mean([a, a + 1])[1:]
    own = [scipy_stats.trim_mean(np.concatenate([RNG.choice(a, 40), RNG.choice(a + 1, 40)]), 0.25) for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(own, [0.025, 0.975]), abs=0.03)


def test_a_single_run_has_no_interval():
    found = stats.probability_of_improvement([[0.5]], [[0.2, 0.3]])
    assert found.value == 1 and math.isnan(found.low) and math.isnan(found.high)
