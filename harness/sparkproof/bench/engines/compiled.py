"""torch.compile of what transformers and PEFT compute, static shapes, one graph an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparkproof.bench.engines import hf
from sparkproof.bench.inputs import Builder, Forward, Inputs
from sparkproof.bench.shapes import Case


def version() -> str:
    """PyTorch's."""
    return f"torch {torch.__version__}"


_last: tuple[Case, Any] | None = None  # compiled once for all sets of inputs of a case


def _compiled(case: Case) -> Any:
    global _last
    if _last is None or _last[0] != case:
        torch._dynamo.reset()
        function = hf.FUNCTIONS[case.op]

        def call(t: Inputs) -> tuple[Tensor, ...]:
            return function(case, t)

        _last = case, torch.compile(call, dynamic=False)
    return _last[1]


def _build(case: Case, t: Inputs) -> Forward:
    call = _compiled(case)
    return lambda: call(t)


BUILDERS: dict[str, Builder] = dict.fromkeys(hf.FUNCTIONS, _build)
ABSENT = {
    "dequantize_4bit": "bitsandbytes' kernel is one call that a compiler can't change",
    "adamw8bit": "bitsandbytes' optimiser is no part of a graph",
}
