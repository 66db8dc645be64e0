"""Asks NVML about every GPU and prints one JSON document: `python -m sparkproof.facts.nvml_child`.

Each query stands alone. On a GB10 the memory query answers NOT_SUPPORTED by design, which is written down as a fact
beside the answers of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons, less the two that are no throttling (idle, display clock).
REASONS = {
    0x2: "application clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
GIB = 2.0**30


def main() -> None:
    """Print what NVML says; a library that cannot be loaded is said in `errors`."""
    errors: dict[str, str] = {}
    document: dict[str, Any] = {"version": None, "cuda_version": None, "errors": errors, "gpus": [], "processes": None}
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as e:
        errors["init"] = f"{type(e).__name__}: {e}" if isinstance(e, ImportError) else str(e)
        print(json.dumps(document))
        return

    def ask(query: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as e:  # a query the driver does not know must not hide the others
            errors[query] = str(e)
            return None

    document["version"] = text(ask("driver_version", pynvml.nvmlSystemGetDriverVersion))
    cuda = ask("cuda_version", pynvml.nvmlSystemGetCudaDriverVersion_v2)
    document["cuda_version"] = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None
    for index in range(ask("count", pynvml.nvmlDeviceGetCount) or 0):
        handle = ask("handle", pynvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        capability = ask("compute_capability", pynvml.nvmlDeviceGetCudaComputeCapability, handle)
        memory = ask("memory", pynvml.nvmlDeviceGetMemoryInfo, handle)
        reasons = ask("clock_reasons", pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        power = ask("power", pynvml.nvmlDeviceGetPowerUsage, handle)
        document["gpus"].append(
            {
                "name": text(ask("name", pynvml.nvmlDeviceGetName, handle)) or "NVIDIA GPU",
                "uuid": text(ask("uuid", pynvml.nvmlDeviceGetUUID, handle)),
                "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
                "memory_total_gib": round(memory.total / GIB, 2) if memory and memory.total else None,
                "sm_clock_mhz": ask("sm_clock", pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
                "max_sm_clock_mhz": ask("max_sm_clock", pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
                "throttle_reasons": [name for bit, name in REASONS.items() if reasons & bit],
                "temperature_c": ask(
                    "temperature", pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU
                ),
                "power_w": round(power / 1000, 1) if power is not None else None,
            }
        )
        for kind in ("Compute", "Graphics"):
            running = ask("processes", getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses"), handle)
            if running is not None:
                document["processes"] = document["processes"] or []
                document["processes"] += [
                    {
                        "pid": p.pid,
                        "name": process_name(p.pid),
                        "memory_gib": round(p.usedGpuMemory / GIB, 3) if p.usedGpuMemory else None,
                    }
                    for p in running
                    if p.pid not in {known["pid"] for known in document["processes"]}
                ]
    print(json.dumps(document))


def text(value: str | bytes | None) -> str | None:
    """NVML bindings give bytes or text, by version."""
    return value.decode() if isinstance(value, bytes) else value


def process_name(pid: int) -> str | None:
    """Its short name; None when the process is not in this PID namespace."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return None


if __name__ == "__main__":
    main()
