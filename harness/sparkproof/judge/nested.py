"""Intervals of samples that come in groups, such as the steps of several processes.

Steps of one process resemble each other more than those of another, so drawing single steps would make an interval too narrow.
Groups are drawn first, then samples in each: both ways in which a repeat could have come out differently.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from sparkproof.judge.stats import Interval, bootstrap

Groups = Sequence[Sequence[float]]


def _value(groups: Groups) -> float:
    return statistics.median(statistics.median(g) for g in groups)


def _drawn(r: random.Random, groups: Groups) -> float:
    return _value([r.choices(g, k=len(g)) for g in r.choices(groups, k=len(groups))])


def median(groups: Groups, seed: int = 1) -> Interval:
    """Median of the groups' medians with its interval. Errors: ValueError without groups, or an empty one."""
    return bootstrap(lambda r: _drawn(r, groups), _value(groups), seed)


def ratio(over: Groups, under: Groups, seed: int = 1) -> Interval:
    """Median of `over` by median of `under`, drawn apart."""
    return bootstrap(lambda r: _drawn(r, over) / _drawn(r, under), _value(over) / _value(under), seed)
