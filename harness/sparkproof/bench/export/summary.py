"""From rounds to a row's figures. A row that ran on the wrong backend, or failed, keeps no speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from sparkproof.bench.document import Interval
from sparkproof.bench.export.document import Row
from sparkproof.bench.train.compare import drift
from sparkproof.bench.train.document import Canary
from sparkproof.judge import nested


def middle(samples: Sequence[float]) -> float:
    """The median."""
    return statistics.median(samples)


def finish(row: Row) -> None:
    """Set everything that follows from the rounds."""
    if row.writes:
        row.write_s = _interval([[w.seconds] for w in row.writes])
        row.write_peak_gib = _largest(w.peak_gib for w in row.writes)
    if row.status == "wrong backend":
        row.reads = []  # of rounds before, which proved another backend: what moved is not one speed
    if row.status == "measured":
        row.load_s = _interval([[r.load_s] for r in row.reads])
        row.read_peak_gib = _largest(r.peak_gib for r in row.reads)
        row.read_gpu_gib = _largest(r.gpu_gib for r in row.reads)
        row.prefill_tokens_s = _interval([r.prefill_tokens_s for r in row.reads])
        row.decode_tokens_s = _interval([r.decode_tokens_s for r in row.reads])


def canary(rows: Sequence[Row]) -> Canary | None:
    """Every reading process's large copy against their median."""
    found = {f"{row.format}, round {r.number}": r.copy_gb_s for row in rows for r in row.reads if r.copy_gb_s}
    return drift(found)


def _interval(groups: Sequence[Sequence[float]]) -> Interval:
    return Interval.of(nested.median(groups))


def _largest(found: Iterable[float | None]) -> float | None:
    known = [x for x in found if x is not None]
    return max(known) if known else None
