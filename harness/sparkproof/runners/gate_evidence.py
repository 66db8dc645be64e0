"""What the phases of a training case returned, and the words that every rule of the gate uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparkproof.results import Assertion


@dataclass
class Evidence:
    """What the phases returned; see `sparkproof.runners.train_child` for the keys."""

    run: dict[str, Any]
    again: dict[str, Any]
    parity: dict[str, Any]  # see `sparkproof.runners.parity`

    @property
    def closest(self) -> tuple[str, dict[str, Any]]:
        """(what it was computed in, the first step's account): fp32 where the engine has it, since bf16 hides much."""
        own = self.again["gradients"]
        compute = "fp32" if "fp32" in own else "bf16"
        return compute, own[compute]


def within(name: str, value: float, band: tuple[float, float], unit: str = "", detail: str = "") -> Assertion:
    """`value` lies in the closed band; NaN does not."""
    low, high = band
    return Assertion(
        name=name,
        passed=low <= value <= high,
        value=number(value),
        bound=f"{low:g} to {high:g}",
        unit=unit,
        detail=detail,
    )


def number(value: float) -> float | str:
    """The value as JSON can carry it: NaN and infinity become words."""
    return value if math.isfinite(value) else str(value)


def example(names: Sequence[str]) -> str:
    """The first of `names` as a sentence, or nothing."""
    return f"For example {names[0]}." if names else ""


def none_left(name: str, left: Sequence[str]) -> Assertion:
    """`left`, the things that should not be, is empty."""
    return Assertion(name=name, passed=not left, value=len(left), bound="0", detail=example(left))
