"""Measurements of a training run, with what they were measured with."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

from sparkproof.results import Measurement
from sparkproof.scenario import TrainScenario

WARM_UP = 3  # first steps allocate, choose kernels and fill caches
# Between two like runs on one H200, beside another program: loading 7.2 and 5.1 s, the machine's memory 1.35 and 2.07 GiB,
# energy of a short training 17.8 and 16.5 mJ a token (the driver counts it ten times a second).
LOAD_NOISE_S, MACHINE_NOISE_GIB, ENERGY_NOISE = 3.0, 1.0, 0.15


def measurements(
    s: TrainScenario, ran: dict[str, Any], peak_tree_gib: float, machine_gib: float = 0.0
) -> list[Measurement]:
    """Throughput in real tokens, step times, MFU and speed of light, energy, load time and memory.

    The warm-up steps are left out of the times. MFU and speed of light are against this process's own canaries: the rate of
    products, and of copies. Energy is that of all steps, and there only where NVML tells it.
    """
    seconds, tokens = ran["seconds"][WARM_UP:], ran["tokens"][WARM_UP:]
    before = ran["canaries"].get("before") or {}
    conditions = {
        **ran["conditions"],
        **{k: v for k, v in ran["during"].items() if k not in ("max_clock_mhz", "energy_j")},
        **{f"canary_{k}": before[k] for k in ("copy_gb_s", "gemv_gb_s", "gemm_tflops") if k in before},
        "engine": s.engine,
        "mode": ran["ran"]["mode"],
        "batch": s.batch,
        "seq_len": s.seq_len,
        "warm_up_steps": WARM_UP,
    }
    found: list[Measurement] = []

    def add(
        name: str, value: float, unit: str, better: bool | None, samples: list[float] | None = None, **more: Any
    ) -> None:
        found.append(
            Measurement(
                name=name,
                value=value,
                unit=unit,
                higher_is_better=better,
                samples=samples or [],
                conditions=conditions,
                **more,
            )
        )

    if len(seconds) >= 2:
        milliseconds = [1000 * t for t in seconds]
        rates = [n / t for n, t in zip(tokens, seconds, strict=True)]
        add("tokens_per_s", sum(tokens) / sum(seconds), "tokens/s", True, rates)
        add("step_p50_ms", median(milliseconds), "ms", False, milliseconds)
        add("step_p95_ms", quantiles(milliseconds, n=20, method="inclusive")[-1], "ms", False, milliseconds)
        flops = ran["work"].get("flops", [])[WARM_UP:]
        if flops and "gemm_tflops" in before:
            gemm, copy = before["gemm_tflops"] * 1e12, before["copy_gb_s"] * 1e9
            shares = [100 * f / t / gemm for f, t in zip(flops, seconds, strict=True)]
            rate = {"reference": 100.0, "reference_name": f"products alone, {before['gemm_tflops']:g} TFLOP/s"}
            add("MFU", 100 * sum(flops) / sum(seconds) / gemm, "% of GEMM", True, shares, **rate)
            floors = [f / gemm + ran["work"]["bytes"] / copy for f in flops]
            light = [100 * f / t for f, t in zip(floors, seconds, strict=True)]
            named = "products and reading the weights alone, at this device's own rates"
            add(
                "speed of light", 100 * sum(floors) / sum(seconds), "% of the floor", True, light,
                reference=100.0, reference_name=named,
            )  # fmt: skip
    if "energy_j" in ran["during"]:
        energy = 1000 * ran["during"]["energy_j"] / sum(ran["tokens"])
        add("energy a token", energy, "mJ", False, noise=ENERGY_NOISE * energy)
    add("load_s", ran["load_s"], "s", False, noise=LOAD_NOISE_S)
    add("peak_rss_gib", max(peak_tree_gib, ran["memory"]["peak_rss_gib"]), "GiB", False)
    add("peak_machine_gib", machine_gib, "GiB", False, noise=MACHINE_NOISE_GIB)
    for name in ("peak_gpu_allocated_gib", "peak_gpu_reserved_gib"):
        if name in ran["memory"]:
            add(name, ran["memory"][name], "GiB", False)
    return found
