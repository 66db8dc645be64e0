"""One type for each weight: the least predicted KL within the bytes, or the fewest bytes within the KL.

The predictions add up, since rounding errors of different weights don't know of each other. So it is a knapsack with one
choice a weight. Each weight's types are thinned to those on the lower convex hull of KL over bytes; all steps along the hulls,
taken from the best KL a byte to the worst, pass through optimal mixes (Lagrange: every step better than a price is taken). What
is left of the budget, less than one step, is filled with whatever single change still fits and gains most.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from sparktune.quant.dynamic.table import Option, Row, Table

Mix = dict[str, str]  # weight -> type


@dataclass(frozen=True)
class Point:
    """One mix on the frontier."""

    bytes: int
    kl: float
    mix: Mix


def hull(options: dict[str, Option]) -> list[str]:
    """Names of the types on the lower convex hull of KL over bytes, fewest bytes first."""
    best: list[str] = []
    for name in sorted(options, key=lambda n: (options[n].bytes, options[n].kl)):
        if best and options[name].kl >= options[best[-1]].kl:
            continue  # more bytes for no less KL
        while len(best) > 1 and _gain(options, best[-1], name) >= _gain(options, best[-2], best[-1]):
            best.pop()
        best.append(name)
    return best


def _gain(options: dict[str, Option], a: str, b: str) -> float:
    """KL saved a byte from `a` to `b`."""
    more = options[b].bytes - options[a].bytes
    saved = options[a].kl - options[b].kl
    return saved / more if more > 0 else float("inf")


def total(table: Table, mix: Mix) -> tuple[int, float]:
    """Bytes of the whole model and predicted KL of `mix`."""
    size = table.fixed_bytes + sum(row.options[mix[row.name]].bytes for row in table.rows)
    return size, sum(row.options[mix[row.name]].kl for row in table.rows)


def smallest(table: Table) -> Mix:
    """Every weight in its smallest type; of two of one size, the better."""
    return {row.name: hull(row.options)[0] for row in table.rows}


def frontier(table: Table) -> list[Point]:
    """Every optimal mix along the hulls, from the fewest bytes to the least KL."""
    mix = smallest(table)
    size, kl = total(table, mix)
    points = [Point(size, kl, dict(mix))]
    for row, name in _steps(table):
        old, new = row.options[mix[row.name]], row.options[name]
        mix[row.name] = name
        size, kl = size + new.bytes - old.bytes, kl + new.kl - old.kl
        points.append(Point(size, kl, dict(mix)))
    return points


def _steps(table: Table) -> list[tuple[Row, str]]:
    """The hulls' steps, best KL a byte first; within one weight they come in order, since a hull is convex."""
    steps = []
    for index, row in enumerate(table.rows):
        names = hull(row.options)
        steps += [(-_gain(row.options, a, b), index, k, row, b) for k, (a, b) in enumerate(pairwise(names))]
    return [(row, name) for *_, row, name in sorted(steps, key=lambda s: s[:3])]


def within_budget(table: Table, budget: int) -> Mix:
    """The mix of least predicted KL in `budget` bytes. Errors: ValueError where even the smallest types take more."""
    mix = smallest(table)
    size, _ = total(table, mix)
    if size > budget:
        raise ValueError(
            f"The smallest types of this table take {size / 2**30:.3f} GiB, more than the budget of {budget / 2**30:.3f} GiB: "
            "raise the budget or allow smaller types."
        )
    stopped: set[str] = set()
    for row, name in _steps(table):
        more = row.options[name].bytes - row.options[mix[row.name]].bytes
        if row.name in stopped or size + more > budget:
            stopped.add(row.name)  # a later step of this weight would skip one
            continue
        mix[row.name] = name
        size += more
    return _fill(table, mix, budget - size)


def _fill(table: Table, mix: Mix, left: int) -> Mix:
    """Spend `left` bytes on the single change that gains most, again and again."""
    while True:
        best: tuple[float, Row, str] | None = None
        for row in table.rows:
            now = row.options[mix[row.name]]
            for name, option in row.options.items():
                saved = now.kl - option.kl
                if option.bytes - now.bytes <= left and saved > 0 and (best is None or saved > best[0]):
                    best = (saved, row, name)
        if best is None:
            return mix
        _, row, name = best
        left -= row.options[name].bytes - row.options[mix[row.name]].bytes
        mix[row.name] = name


def within_kl(table: Table, target: float) -> Mix:
    """The smallest mix on the frontier of predicted KL `target` or less. Errors: ValueError where none comes so near."""
    points = frontier(table)
    for point in points:
        if point.kl <= target:
            return point.mix
    raise ValueError(
        f"The best types of this table still give a KL of {points[-1].kl:.2g}, more than the target of {target:g}: allow "
        "larger types, or raise the target."
    )
