"""What the child processes of this folder share: they print JSON lines, the surest first."""

from __future__ import annotations

import json
from typing import Any

WORST = 9999.0  # JSON has neither NaN nor infinity


def say(**facts: Any) -> None:
    """One line of facts, flushed, so that it survives what comes next."""
    print(json.dumps(facts), flush=True)


def reason(e: BaseException) -> str:
    """The exception in one line; of several lines the one that says most."""
    lines = [line.strip() for line in str(e).strip().splitlines() if line.strip()]
    telling = next((s for s in lines if "Required" in s or "out of resource" in s), lines[0] if lines else "")
    return f"{type(e).__name__}: {telling[:400]}"


def relative(got: Any, want: Any) -> float:
    """Relative L2 distance of two tensors in float64, at most WORST."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = float((got - want).norm() / want.norm())
    return error if error < WORST else WORST
