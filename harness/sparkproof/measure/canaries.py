"""Canaries and sensors around what is timed: whether the device was the same before and after, and how it was meanwhile.

The same three timings as the doctor's (`sparkproof.facts.canaries_child`), shorter, and in the process that is timed: copy,
matrix times vector, matrix times matrix. The vector product is there since a hidden slow state of a Spark shows in it alone
(row 49 of docs/failures.md). Their rates are also the ceilings that a step is held against.
"""

from __future__ import annotations

import threading
from typing import Any

LOAD_S = 1.0  # half of it before the clock is read: clocks rise late
PERIOD_S = 0.2


def take() -> dict[str, Any]:
    """{"copy_gb_s", "gemv_gb_s", "gemm_tflops", clock, heat, power and slowdowns under load}, or {"error": why}.

    Takes about two seconds and 0.8 GiB, which are given back; the allocator's peaks begin anew after it.
    """
    import torch

    from sparkproof.facts import canaries_child as child

    why = child.refusal(torch)
    if why:
        return {"error": why}
    # Training asks for deterministic algorithms, which a canary must not: it would time another one after than before.
    strict, lenient = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        found = {"copy_gb_s": child.copy_rate(torch), "gemv_gb_s": child.gemv_rate(torch), **child.load(torch, LOAD_S)}
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=lenient)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


class Watch:
    """Reads clock, heat, power and slowdowns five times a second while something runs, and the energy that it took.

    `sensors` is a `canaries_child.Sensors`, or anything with its methods.
    """

    def __init__(self, sensors: Any) -> None:
        self.sensors = sensors
        self.energy_j: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    @classmethod
    def of_device(cls) -> Watch:
        """For the device that torch uses."""
        import torch

        from sparkproof.facts.canaries_child import Sensors

        return cls(Sensors(torch.cuda.get_device_properties(torch.cuda.current_device())))

    def __enter__(self) -> Watch:
        self._before = self.sensors.energy_mj()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        after = self.sensors.energy_mj()
        if self._before is not None and after is not None and after > self._before:
            self.energy_j = (after - self._before) / 1000

    def _read(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.sensors.read()

    def summary(self) -> dict[str, Any]:
        """ "clock_mhz", "power_w", "temperature_c" (medians), "slowdowns", "max_clock_mhz", "energy_j"; the unknown left out."""
        s = self.sensors.summary()
        found = {
            "clock_mhz": s.get("load_clock_mhz"),
            "power_w": s.get("load_power_w"),
            "temperature_c": s.get("load_temperature_c"),
            "slowdowns": s.get("load_throttle_reasons"),
            "max_clock_mhz": self.sensors.max_clock_mhz(),
            "energy_j": self.energy_j,
        }
        return {k: v for k, v in found.items() if v is not None}
