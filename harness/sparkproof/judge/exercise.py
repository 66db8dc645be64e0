"""Run ops once, small, forward and backward, and compare nothing: `python -m sparkproof.judge.exercise OP...`.

For tools that watch a process from outside, such as compute-sanitizer (scripts/sanitize.py). Each op runs at its typical
and its odd sizes, in two dtypes and all variants, with contiguous and with sliced inputs. Without names: all ops.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import torch
from sparktune.ops import load_op, op_names
from sparktune.ops.spec import OpSpec, Problem, named

from sparkproof.judge.correctness import mode_here
from sparkproof.judge.families import FAMILIES, NORMAL, Family, make_gradient, make_inputs

SIZES = ("typical", "prime", "wide", "whole blocks", "one")
SLICED = next(f for f in FAMILIES if f.inputs == "sliced")


def exercise(spec: OpSpec) -> int:
    """Run one op; returns how many calls were made. Whatever the op raises goes through."""
    _, device = mode_here()
    count = 0
    for p, family in _problems(spec):
        inputs = make_inputs(spec, p, family, device)
        out = named(spec.call(inputs, p))
        wanted = [t for t in inputs.values() if t.requires_grad]
        through = [k for k, o in out.items() if o.requires_grad and k not in spec.without_gradient]
        if wanted and through:
            grads = [make_gradient(spec, p, family, out[k], k) for k in through]
            torch.autograd.grad([out[k] for k in through], wanted, grads, allow_unused=True)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def _problems(spec: OpSpec) -> Iterator[tuple[Problem, Family]]:
    dtypes = [d for d in spec.dtypes if d in (torch.float32, torch.bfloat16)] or spec.dtypes[:1]
    for variant in spec.variants:
        for dtype in dtypes:
            for size in SIZES:
                if size in spec.sizes:
                    yield spec.problem(size, dtype, variant), NORMAL
            yield spec.problem("typical", dtype, variant), SLICED


def main(names: list[str]) -> int:
    """Run the named ops, or all; 1 after the first that raised."""
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    for name in names or op_names():
        try:
            print(f"{name}: {exercise(load_op(name))} calls", flush=True)
        except Exception as e:
            print(f"{name}: {type(e).__name__}: {e}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
