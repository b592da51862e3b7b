"""Intervals and tests against published or hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finesight.evaluation.statistics import is_binary, mcnemar_exact, paired_bootstrap, score_interval, wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (1, 3), (81, 263), (15, 148), (500, 1000)])
def test_wilson_interval_equals_scipy(successes, trials):
    stats = pytest.importorskip("scipy.stats")  # comes with scikit-learn
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_as_published():
    # Newcombe 1998, table I: 81 of 263, method 3 (score without continuity correction).
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (5, 0), (0, 5), (6, 1), (10, 10), (40, 12)])
def test_exact_mcnemar_equals_the_binomial_test(fixed, broken):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(fixed, fixed + broken, 0.5).pvalue if fixed + broken else 1.0
    assert mcnemar_exact(fixed, broken) == pytest.approx(expected, rel=1e-12)


def test_exact_mcnemar_by_hand():
    assert mcnemar_exact(5, 0) == 2 / 32
    assert mcnemar_exact(6, 0) == 2 / 64
    assert mcnemar_exact(1, 5) == 2 * (1 + 6) / 64


def test_intervals_of_scores_in_between():
    scores = [0.2, 0.9, 0.5, 0.7, 0.1, 1.0, 0.8, 0.65] * 25
    low, high = score_interval(scores)
    margin = 1.96 * np.std(scores) / math.sqrt(len(scores))
    assert low == pytest.approx(np.mean(scores) - margin, abs=0.01) and high == pytest.approx(np.mean(scores) + margin, abs=0.01)
    assert score_interval([1, 1, 0, 1]) == wilson_interval(3, 4)
    assert is_binary([0, 1, 1.0]) and not is_binary([0.5])


def test_paired_bootstrap_tells_a_change_from_noise():
    generator = np.random.default_rng(1)
    before = generator.uniform(size=200)
    assert paired_bootstrap(before, before) == (0.0, 0.0, 1.0)
    low, high, p = paired_bootstrap(before, before + 0.1 + 0.1 * generator.standard_normal(200))
    assert 0.07 < low < 0.1 < high < 0.125 and p <= 1e-3
    low, high, p = paired_bootstrap(before, before + 0.1 * generator.standard_normal(200))
    assert low < 0 < high and p > 0.05
    assert paired_bootstrap([0.0, 0.3, 0.5], [0.5, 0.1, 0.9]) == paired_bootstrap([0.0, 0.3, 0.5], [0.5, 0.1, 0.9])
