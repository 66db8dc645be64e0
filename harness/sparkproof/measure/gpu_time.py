"""What work takes on the current CUDA device, between two events on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def gpu_ms(torch: Any, work: Callable[[], Any], hold_cycles: int = 0) -> float:
    """Milliseconds from before the first to after the last kernel that `work` starts, which is waited for.

    `hold_cycles`: cycles of its clock for which the device is kept busy before, so that all is queued by the time it gets
    there. Without that, a device that is done before Python has queued the next thing makes events time Python.
    """
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hold_cycles:
        torch.cuda._sleep(hold_cycles)
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))
