"""How ops that work on whole rows of a matrix are launched: the norms that read a row, reduce it and write it.

A row that fits a block of at most 8192 columns stays in registers between its reduction and its result; a wider one is
read twice, in steps, the second time from cache. Blocks hold 8 to 16 elements of each operand a thread: two loads of 16
bytes in bf16, so that a streaming multiprocessor with 1024 threads has 32 KiB an operand on the way, several times what
an H100 needs to keep its memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparktune.ops.device import DeviceProperties
from sparktune.ops.launching import cdiv


@dataclass(frozen=True)
class RowConfig:
    """One launch of a row kernel."""

    block: int  # columns a block, a power of two
    single: bool  # the whole row in one block
    num_warps: int
    programs: int
    rows_each: int  # rows a program; the last may have fewer

    BLOCKS = ((1024, 4), (2048, 4), (4096, 8), (8192, 16))  # (columns, warps)
    WIDE = (4096, 8)
    WIDTHS = (1024, 2048, 4096, 8192, 8193)  # one row width for each of the above and one for the steps
    SUMS_WIDEST = 4096  # columns up to which sums over rows are kept in registers too: at 8192, 24 to 48 bytes spill
    WARPS_PER_SM = 16  # where every program leaves a row of partial sums that must be read again: few programs

    @classmethod
    def choose(cls, m: int, n: int, p: DeviceProperties, sums: bool = False) -> RowConfig:
        """The smallest block that takes a whole row of `n` columns.

        `sums`: programs add up something over rows. Then each takes many rows, and as few programs run as keep the
        memory busy; else every row is a program of its own. What does not fit SUMS_WIDEST is added up in memory, in
        rows that stay in cache.
        """
        fits = ((b, w) for b, w in cls.BLOCKS if n <= b and (not sums or b <= cls.SUMS_WIDEST))
        block, warps = next(fits, cls.WIDE)
        resident = p.sm_count * max(1, min(cls.WARPS_PER_SM, p.threads_per_sm // 32) // warps)
        rows_each = cdiv(m, min(m, resident)) if sums else 1
        return cls(block, n <= block, warps, cdiv(m, rows_each), rows_each)
