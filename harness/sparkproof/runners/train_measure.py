"""Measurements of a training run, with what they were measured with."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

from sparkproof.results import Measurement
from sparkproof.scenario import TrainScenario

WARM_UP = 3  # first steps allocate, choose kernels and fill caches


def measurements(s: TrainScenario, ran: dict[str, Any], peak_tree_gib: float) -> list[Measurement]:
    """Throughput in real tokens, step times, load time and memory; the warm-up steps are left out of the times."""
    seconds, tokens = ran["seconds"][WARM_UP:], ran["tokens"][WARM_UP:]
    conditions = {
        **ran["conditions"],
        "engine": s.engine,
        "mode": ran["ran"]["mode"],
        "batch": s.batch,
        "seq_len": s.seq_len,
        "warm_up_steps": WARM_UP,
    }
    found: list[Measurement] = []

    def add(name: str, value: float, unit: str, better: bool | None, samples: list[float] | None = None) -> None:
        found.append(
            Measurement(
                name=name,
                value=value,
                unit=unit,
                higher_is_better=better,
                samples=samples or [],
                conditions=conditions,
            )
        )

    if len(seconds) >= 2:
        milliseconds = [1000 * t for t in seconds]
        add(
            "tokens_per_s",
            sum(tokens) / sum(seconds),
            "tokens/s",
            True,
            [n / t for n, t in zip(tokens, seconds, strict=True)],
        )
        add("step_p50_ms", median(milliseconds), "ms", False, milliseconds)
        add("step_p95_ms", quantiles(milliseconds, n=20, method="inclusive")[-1], "ms", False)
    add("load_s", ran["load_s"], "s", False)
    add("peak_rss_gib", max(peak_tree_gib, ran["memory"]["peak_rss_gib"]), "GiB", False)
    for name in ("peak_gpu_allocated_gib", "peak_gpu_reserved_gib"):
        if name in ran["memory"]:
            add(name, ran["memory"][name], "GiB", False)
    return found
