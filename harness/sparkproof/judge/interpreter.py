"""Triton's interpreter: whether it works here (under numpy 2.4 and later that of Triton 3.6 fails at a loop to an argument),
and running programs in another order than it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from sparktune.ops import dispatch


@triton.jit
def _sum_below(out_ptr, n):  # type: ignore[no-untyped-def]
    total = 0
    for i in range(n):
        total += i
    tl.store(out_ptr, total)


def unable() -> str:
    """Why kernels can't be interpreted in this process, which began with TRITON_INTERPRET=1; '' when they can."""
    import numpy as np

    out = torch.zeros(1, dtype=torch.int32)
    try:
        _sum_below[(1,)](out, 5)
    except Exception as e:
        return (
            f"the interpreter of Triton {triton.__version__} can't run a loop under numpy {np.__version__} "
            f"({str(e)[:120]})"
        )
    return "" if int(out) == 10 else f"the interpreter of Triton {triton.__version__} computes a loop wrongly"


@contextlib.contextmanager
def last_programs_first() -> Iterator[None]:
    """Within, interpreted kernels run their programs from the last to the first; elsewhere nothing changes.

    A GPU runs programs in any order. The interpreter's is fixed, so a program that writes over its neighbour's results goes
    unseen where the neighbour writes them again later.
    """
    if not dispatch.INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import interpreter_builder

    kind = type(interpreter_builder)
    forwards = kind.set_grid_idx

    def backwards(self: object, *place: int) -> None:
        size = self.grid_dim  # type: ignore[attr-defined]
        forwards(self, *(n - 1 - i for n, i in zip(size, place, strict=True)))

    kind.set_grid_idx = backwards
    try:
        yield
    finally:
        kind.set_grid_idx = forwards
