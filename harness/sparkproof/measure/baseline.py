"""Has the memory come back that the cases before took? Waited for before a case, and named where it has not.

What a killed process held is given back late on a Spark, 60 s and more were seen, and some not before a reboot (row 43 of
docs/failures.md). A case that starts meanwhile finds less than the machine has, and its peak is not its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sparkproof.facts.model import Facts
from sparkproof.measure.memory import GIB, available_gib

BAND_GIB = 2.0
WAIT_S = 90.0
POLL_S = 0.5


@dataclass(frozen=True)
class Return:
    """How it went: what was available at the run's start and is now, and how long was waited, in GiB and seconds."""

    before: float
    now: float
    waited_s: float
    holders: str = ""

    @property
    def back(self) -> bool:
        """Whether all but 2 GiB came back."""
        return self.before - self.now <= BAND_GIB

    @property
    def notice(self) -> str:
        """What a reader of the case must know; empty where nothing was left or waited for."""
        if not self.back:
            held = f"; most is held by {self.holders}" if self.holders else "; no process of this user holds it"
            return (
                f"Memory had not come back before this case: {self.now:.1f} of {self.before:.1f} GiB were available after "
                f"{self.waited_s:.0f} s{held} (row 43)."
            )
        return (
            f"Memory was waited for, {self.waited_s:.0f} s, until it had come back (row 43)."
            if self.waited_s >= 1
            else ""
        )


def reader(facts: Facts) -> Callable[[], float] | None:
    """What reads available memory of the device that trains, in GiB: the pool where it is shared, else the GPU's own by NVML.

    None without a GPU that torch can use, where other people's programs come and go, and where NVML does not tell.
    """
    gpu = facts.gpu
    if gpu is None or not gpu.usable_by_torch:
        return None
    if gpu.integrated:
        return available_gib
    try:
        return _free_of_card(gpu.uuid)
    except Exception:  # no NVML, or it does not know this device's memory
        return None


def _free_of_card(uuid: str | None) -> Callable[[], float]:
    import pynvml

    pynvml.nvmlInit()
    handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)

    def read() -> float:
        return float(pynvml.nvmlDeviceGetMemoryInfo(handle).free) / GIB

    read()
    return read


def wait(
    before: float, read: Callable[[], float], wait_s: float = WAIT_S, sleep: Callable[[float], None] = time.sleep
) -> Return:
    """Until all but 2 GiB of `before` are available again, at most `wait_s` seconds."""
    start, waited = time.monotonic(), 0.0
    while True:
        found = Return(before, read(), waited)
        if found.back or waited >= wait_s:
            return found if found.back else Return(before, found.now, waited, holders())
        sleep(POLL_S)
        waited = max(waited + POLL_S, time.monotonic() - start)


def holders(count: int = 3) -> str:
    """The processes that hold most, other than this one: name, pid and resident size."""
    import psutil

    found = []
    for p in psutil.process_iter(["pid", "name", "memory_info"]):
        with suppress(psutil.Error, AttributeError):
            if p.info["pid"] != os.getpid() and p.info["memory_info"].rss > GIB:
                found.append((p.info["memory_info"].rss / GIB, f"{p.info['name']} {p.info['pid']}"))
    return ", ".join(f"{name} ({size:.1f} GiB)" for size, name in sorted(found, reverse=True)[:count])
