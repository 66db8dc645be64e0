"""Three short timings on the GPU and the clock under load: `python -m sparkproof.facts.canaries_child` prints JSON lines.

What is asked for is less than a GiB, and only where that much more than the watchdog's floor is available.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from sparkproof.facts.child import say
from sparkproof.facts.nvml_child import REASONS
from sparkproof.measure.gpu_time import gpu_ms
from sparkproof.measure.memory import available_gib, default_floor_gib

GIB = 2.0**30
LOAD_S = 4.0
WARM_S, IN_A_ROW = 0.15, 10
HOLD_CYCLES = 6_000_000  # about 3 ms; ten launches took under one, in a sandbox that is slow at them
COPY_BYTES, GEMV_SHAPE, GEMM_SIZE = 256 * 2**20, (8192, 16384), 4096
NEEDED_GIB = 1.5


def timed_ms(torch: Any, call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of a call by CUDA events: the median of `repeats` rows of calls, after `WARM_S` of them.

    An idle GPU stands at a fraction of its clock, and where the device is done before Python has queued the next thing, events
    time Python: on an H200 a GEMV of 66 us moved by 6 to 11% over a training run when its calls were timed one by one,
    and by 11 to 16% in rows beside a busy processor. So the device is kept busy until the whole row is queued.
    """

    def row() -> None:
        for _ in range(IN_A_ROW):
            call()

    start = time.perf_counter()
    while time.perf_counter() - start < WARM_S:
        row()
        torch.cuda.synchronize()
    return statistics.median(gpu_ms(torch, row, HOLD_CYCLES) / IN_A_ROW for _ in range(repeats))


def canaries(torch: Any) -> None:
    """Copy and matrix-vector bandwidth past the L2 cache, the matrix rate, and the clock under seconds of load."""
    why = refusal(torch)
    if why:
        say(canaries={"error": why})
        return
    found: dict[str, Any] = {"copy_gb_s": copy_rate(torch), "gemv_gb_s": gemv_rate(torch)}
    say(canaries=found, stage="it loaded the GPU")
    found |= load(torch)
    say(canaries=found)


def refusal(torch: Any) -> str:
    """Why there is no room for what the canaries allocate, or ""."""
    free = torch.cuda.mem_get_info(0)[0] / GIB
    spare = min(free, available_gib() - default_floor_gib())
    if spare < NEEDED_GIB:
        return f"only {max(0.0, spare):.1f} GiB are free above the floor; {NEEDED_GIB} are needed"
    return ""


def copy_rate(torch: Any) -> float:
    """GB/s of a device copy, bytes read and written."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return round(2 * COPY_BYTES / timed_ms(torch, lambda: target.copy_(source), 15) / 1e6, 1)


def gemv_rate(torch: Any) -> float:
    """GB/s of a bf16 matrix times a vector, bytes of the matrix."""
    matrix = torch.empty(GEMV_SHAPE, dtype=torch.bfloat16, device="cuda").normal_()
    vector = torch.ones(GEMV_SHAPE[1], dtype=torch.bfloat16, device="cuda")
    return round(matrix.numel() * 2 / timed_ms(torch, lambda: torch.mv(matrix, vector), 15) / 1e6, 1)


def load(torch: Any, seconds: float = 0) -> dict[str, Any]:
    """`seconds` (LOAD_S unless given) of bf16 products; clock, power, heat and slowdowns are read while they run."""
    seconds = seconds or LOAD_S
    x, y = (torch.empty(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    out = torch.empty_like(x)
    sensors = Sensors(torch.cuda.get_device_properties(0))
    once = timed_ms(torch, lambda: torch.mm(x, y, out=out), 3)
    batch = max(1, int(100 / max(once, 1e-3)))  # a tenth of a second between readings
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(batch):
            torch.mm(x, y, out=out)
        last.record()
        if time.perf_counter() - start > seconds / 2:  # clocks rise late
            sensors.read()
        torch.cuda.synchronize()
        rates.append(2.0 * GEMM_SIZE**3 * batch / first.elapsed_time(last) / 1e9)
    return {
        "gemm_tflops": round(statistics.median(rates[len(rates) // 2 :]), 1),
        "load_s": round(time.perf_counter() - start, 1),
        **sensors.summary(),
    }


class Sensors:
    """NVML's readings of the device that torch uses; what the driver does not tell stays out."""

    def __init__(self, properties: Any) -> None:
        self.clocks: list[int] = []
        self.powers: list[float] = []
        self.heats: list[float] = []
        self.reasons: set[str] = set()
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = getattr(properties, "uuid", None)
            self.nvml = pynvml
            self.handle = (
                pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
            )
        except Exception:
            self.nvml = None

    def read(self) -> None:
        """One reading of each."""
        if self.nvml is None:
            return
        n, h = self.nvml, self.handle
        calls: tuple[tuple[list[Any], Callable[[], Any]], ...] = (
            (self.clocks, lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            (self.powers, lambda: n.nvmlDeviceGetPowerUsage(h) / 1000),
            (self.heats, lambda: float(n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU))),
        )
        for values, call in calls:
            try:
                values.append(call())
            except Exception:  # NOT_SUPPORTED is common on a shared pool
                continue
        try:
            bits = n.nvmlDeviceGetCurrentClocksThrottleReasons(h)
            self.reasons |= {name for bit, name in REASONS.items() if bits & bit}
        except Exception:
            return

    def energy_mj(self) -> int | None:
        """Energy that the device has taken since its driver was loaded, in millijoules; None where NVML does not tell."""
        if self.nvml is None:
            return None
        try:
            return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except Exception:  # NOT_SUPPORTED, as for the others
            return None

    def max_clock_mhz(self) -> int | None:
        """The highest SM clock; None where NVML does not tell."""
        if self.nvml is None:
            return None
        try:
            return int(self.nvml.nvmlDeviceGetMaxClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))
        except Exception:
            return None

    def summary(self) -> dict[str, Any]:
        """Medians under the names of `tried.Canaries`."""
        found: dict[str, Any] = {"load_throttle_reasons": sorted(self.reasons)}
        if self.clocks:
            found["load_clock_mhz"] = int(statistics.median(self.clocks))
        if self.powers:
            found["load_power_w"] = round(statistics.median(self.powers), 1)
        if self.heats:
            found["load_temperature_c"] = statistics.median(self.heats)
        return found


def main() -> None:
    """Torch, then the timings."""
    say(stage="it imported torch")
    import torch

    say(stage="it timed copies")
    canaries(torch)
    say(done=True)


if __name__ == "__main__":
    main()
