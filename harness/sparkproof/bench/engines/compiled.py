"""What hf.py calls, under torch.compile with static shapes: what a user gets for one line."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparkproof.bench.cases import Call, Case
from sparkproof.bench.engines import hf

WRITES: frozenset[str] = frozenset()
MISSING = {
    "dequantize_4bit": "bitsandbytes' kernel is one call, which torch.compile leaves as it is",
    "adamw8bit": "bitsandbytes' optimiser is a call into its library, which torch.compile leaves as it is",
}


def refusal() -> str:
    """Why torch.compile has no back end here, or ""."""
    return "" if torch.cuda.is_available() else "torch.compile is measured on a GPU only"


def _compiled(build: Callable[[Case], Call]) -> Callable[[Case], Call]:
    def builder(case: Case) -> Call:
        torch._dynamo.reset()  # each row's function has the same code; past a few recompilations dynamo gives up
        found: Call = torch.compile(build(case), dynamic=False)
        return found

    return builder


BUILDERS: dict[str, Callable[[Case], Call]] = {
    op: _compiled(build) for op, build in hf.BUILDERS.items() if op not in MISSING
}
