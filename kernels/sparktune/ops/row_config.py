"""How ops that work on whole rows of a matrix are launched: the norms that read a row, reduce it and write it.

A row that fits a block of at most 8192 columns stays in registers between its reduction and its result; a wider one is
read twice, in steps, the second time from cache. Blocks hold 8 to 16 elements of each operand a thread: two loads of 16
bytes in bf16, so that a streaming multiprocessor with 1024 threads has 32 KiB an operand on the way, several times what
an H100 needs to keep its memory busy.

With `cut` a row of 2560 or 5120 columns is five pieces (`row_pieces`). On one H200, in shares of a copy's speed at 1024, 4096 and
16384 rows, RMSNorm's backward had 97, 102 and 104% of 5120 columns and in a block of 8192 82, 85 and 86%; of 2560 91, 100 and
103%, and 88, 96 and 98%. Three pieces of 1024 were no faster than a block of 4096. A row that fills its block needs no mask: the
forward of 1024 rows of 4096 had 97% without and 91 with.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparktune.ops.device import DeviceProperties
from sparktune.ops.launching import cdiv


@dataclass(frozen=True)
class RowConfig:
    """One launch of a row kernel."""

    block: int  # columns a block, a power of two
    pieces: int  # blocks of a row that stay in registers; 0 where it is read in steps
    whole: bool  # they fill the row; not asked where sums are kept
    num_warps: int
    programs: int
    rows_each: int  # rows a program; the last may have fewer

    BLOCKS = ((1024, 4), (2048, 4), (4096, 8), (8192, 16))  # (columns, warps)
    WIDE = (4096, 8)
    CUT = ((1024, 8), (512, 4))  # pieces of which five are a row, whose block would have three columns of eight empty
    FIFTHS = (5120, 2560)
    FILLED = (*FIFTHS, 1024, 2048, 4096, 8192)  # every row that pieces or a block fill
    WIDTHS = (1024, 2048, 4096, 8192, 8193)  # one row width for each of the above and one for the steps
    SUMS_WIDEST = 4096  # columns up to which sums over rows are kept in registers too: at 8192, 24 to 48 bytes spill
    WARPS_PER_SM = 16  # where every program leaves a row of partial sums that must be read again: few programs

    @property
    def single(self) -> bool:
        """The row stays in registers."""
        return self.pieces > 0

    @classmethod
    def every_width(cls) -> dict[int, str]:
        """Row widths, with words for them, that between them get every configuration that `cut` gives."""
        padded = {n - 1: f"up to {n}" for n in cls.WIDTHS[:-1]} | {cls.WIDTHS[-1]: f"over {cls.WIDTHS[-1] - 1}"}
        return padded | {n: f"{n}" for n in cls.FILLED}

    @classmethod
    def choose(cls, m: int, n: int, p: DeviceProperties, sums: bool = False, cut: bool = False) -> RowConfig:
        """The smallest block that takes a whole row of `n` columns; with `cut`, pieces that fill it if there are such.

        `sums`: programs add up something over rows. Then each takes many rows, and as few programs run as keep the
        memory busy; else every row is a program of its own. What does not fit SUMS_WIDEST is added up in memory, in
        rows that stay in cache.
        """
        if cut and not sums:
            for block, warps in cls.CUT:
                if n == 5 * block:
                    # On sm_10x add_rms_norm's backward of 5120 columns spills 16 bytes with 8 warps.
                    return cls(block, 5, True, 16 if p.sm_10x and block == 1024 else warps, m, 1)
        fits = ((b, w) for b, w in cls.BLOCKS if n <= b and (not sums or b <= cls.SUMS_WIDEST))
        block, warps = next(fits, cls.WIDE)
        resident = p.sm_count * max(1, min(cls.WARPS_PER_SM, p.threads_per_sm // 32) // warps)
        rows_each = cdiv(m, min(m, resident)) if sums else 1
        return cls(block, int(n <= block), not sums and n == block, warps, cdiv(m, rows_each), rows_each)
