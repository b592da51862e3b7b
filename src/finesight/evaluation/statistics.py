"""How sure a figure is, and whether a change is more than noise. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution
_RESAMPLES = 10_000


def wilson_interval(successes: int, trials: int, z: float = _Z95) -> tuple[float, float]:
    """Confidence interval of a share, 95% by default (Wilson 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    middle = share + z * z / (2 * trials)
    scale = 1 + z * z / trials
    # At the ends the formula gives 0 and 1 but for rounding.
    return (middle - spread) / scale if successes else 0.0, (middle + spread) / scale if successes < trials else 1.0


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean score: Wilson's for right and wrong, a percentile bootstrap for scores in between."""
    if is_binary(scores):
        return wilson_interval(round(sum(scores)), len(scores))
    means = _resampled_means(np.asarray(scores, dtype=np.float64))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Two-sided p of the exact McNemar test: were `fixed` and `broken` as likely as each other (Fagerland et al. 2013)."""
    changed = fixed + broken
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, 2 * tail / 2**changed)


def paired_bootstrap(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, p) of the mean change of paired scores: its 95% percentile interval and two-sided p (Efron 1979).

    p is twice the smaller share of resampled means on one side of no change, never below 1 / resamples.
    """
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not change.any():
        return 0.0, 0.0, 1.0
    means = _resampled_means(change)
    low, high = np.quantile(means, (0.025, 0.975))
    one_side = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return float(low), float(high), min(1.0, max(2 * one_side, 1 / _RESAMPLES))


def is_binary(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return all(score in (0, 1) for score in scores)


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """(resamples,) means of draws with replacement; the same for the same values, so that a report can be made again."""
    generator = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    for start in range(0, _RESAMPLES, 100):  # 100 resamples of 10,000 values take 8 MB
        rows = generator.integers(0, len(values), size=(100, len(values)))
        means[start : start + 100] = values[rows].mean(axis=1)
    return means
