"""Medians with intervals, from few samples, without assuming a distribution."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROUNDS = 2000
CANARY_BAND = 0.05  # copy bandwidth after may differ by this from before


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def spans(self, x: float) -> bool:
        """Whether `x` cannot be told from the value."""
        return self.low <= x <= self.high


def median(samples: Sequence[float], seed: int = 1) -> Interval:
    """Median with its bootstrap interval. Errors: ValueError without samples."""
    return bootstrap(lambda r: statistics.median(r.choices(samples, k=len(samples))), statistics.median(samples), seed)


def ratio(over: Sequence[float], under: Sequence[float], seed: int = 1) -> Interval:
    """Median of `over` by median of `under`, resampled apart, as interleaved runs are not paired by time exactly."""

    def draw(r: random.Random) -> float:
        top, bottom = (statistics.median(r.choices(s, k=len(s))) for s in (over, under))
        return top / bottom

    return bootstrap(draw, statistics.median(over) / statistics.median(under), seed)


def bootstrap(draw: Callable[[random.Random], float], value: float, seed: int) -> Interval:
    """`value` with the 95% interval of what `draw` gives from one source of randomness."""
    rng = random.Random(seed)
    drawn = sorted(draw(rng) for _ in range(ROUNDS))
    return Interval(value, drawn[int(0.025 * ROUNDS)], drawn[int(0.975 * ROUNDS) - 1])


def verdict(speedup: Interval, than: str) -> str:
    """One sentence: how much faster, slower, or that there is no difference."""
    if speedup.spans(1.0):
        return f"no difference from {than} ({speedup.value:.2f} x, {speedup.low:.2f} to {speedup.high:.2f})"
    word, s = ("faster", speedup) if speedup.value > 1 else ("slower", _inverse(speedup))
    return f"{s.value:.2f} x {word} than {than} ({s.low:.2f} to {s.high:.2f})"


def _inverse(i: Interval) -> Interval:
    return Interval(1 / i.value, 1 / i.high, 1 / i.low)
