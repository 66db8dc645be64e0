"""Whether Triton's interpreter works here: under numpy 2.4 and later that of Triton 3.6 fails at a loop to an argument."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
