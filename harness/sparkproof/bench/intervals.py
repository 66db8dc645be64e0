"""The bootstrap intervals of `judge.stats`, without drawing: for an odd number of samples they follow from counting.

The median of n values drawn with replacement from n sorted samples is at most the k-th with the probability that at
least (n + 1) / 2 of n draws are among the first k: a binomial tail. A table has thousands of intervals of five samples, for which
2,000 draws each would take longer than measuring them.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence

from sparkproof.judge import stats
from sparkproof.judge.stats import Interval

LOW, HIGH = 0.025, 0.975


@functools.cache
def weights(n: int) -> tuple[float, ...]:
    """Probability that the median of a resample is the k-th smallest of n samples, n odd."""
    half = (n + 1) // 2

    def at_most(k: int) -> float:
        p = k / n
        return sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(half, n + 1))

    return tuple(at_most(k) - at_most(k - 1) for k in range(1, n + 1))


def _ends(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    total, low, high = 0.0, math.nan, math.nan
    for value, p in sorted(pairs):
        total += p
        if math.isnan(low) and total >= LOW:
            low = value
        high = value
        if total >= HIGH:
            break
    return low, high


def median(samples: Sequence[float]) -> Interval:
    """Median with its interval. Errors: ValueError without samples."""
    if len(samples) % 2 == 0:
        return stats.median(samples)
    return Interval(statistics.median(samples), *_ends(zip(sorted(samples), weights(len(samples)), strict=True)))


def ratio(over: Sequence[float], under: Sequence[float]) -> Interval:
    """Median of `over` by median of `under`, resampled apart."""
    if len(over) % 2 == 0 or len(under) % 2 == 0:
        return stats.ratio(over, under)
    tops = list(zip(sorted(over), weights(len(over)), strict=True))
    bottoms = list(zip(sorted(under), weights(len(under)), strict=True))
    pairs = ((a / b, p * q) for a, p in tops for b, q in bottoms)
    return Interval(statistics.median(over) / statistics.median(under), *_ends(pairs))
