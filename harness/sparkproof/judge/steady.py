"""Was the device steady enough for its speed to be judged? Canaries before and after, the clock under load, slowdowns.

Everything here is about speed: what is missed makes a case a retest, with the sentence of the first that was missed, and
never a failure of what was trained.
"""

from __future__ import annotations

from typing import Any

from sparkproof.checks.gpu import SLOWDOWNS
from sparkproof.checks.lore import LORE
from sparkproof.checks.power import LOW_CLOCK, LOW_GEMV
from sparkproof.facts.model import Facts
from sparkproof.results import Assertion

BANDS = {  # what -> (name, unit, how far after may lie from before)
    "copy_gb_s": ("copy", "GB/s", 0.05),
    "gemv_gb_s": ("GEMV", "GB/s", 0.05),
    "gemm_tflops": ("GEMM", "TFLOP/s", 0.10),  # its clock follows power and heat, which a run raises
}


def steady(before: dict[str, Any], after: dict[str, Any], during: dict[str, Any], facts: Facts) -> list[Assertion]:
    """Assertions about speed. `before` and `after` are what `measure.canaries.take` gives, `during` a `Watch.summary`."""
    errors = [x["error"] for x in (before, after) if "error" in x]
    if errors or not before or not after:
        why = errors[0] if errors else "they gave nothing"
        return [_said("canaries before and after", False, None, "taken", "", f"The canaries were not taken: {why}.")]
    found = [_drift(key, before[key], after[key]) for key in BANDS if key in before and key in after]
    slowest = min(before["gemv_gb_s"] / before["copy_gb_s"], after["gemv_gb_s"] / after["copy_gb_s"])
    found.append(
        _said(
            "GEMV beside the copy", slowest >= LOW_GEMV, round(slowest, 2), f">= {LOW_GEMV}", "x",
            f"GEMV runs at {slowest:.0%} of the copy's bandwidth, as in the hidden slow state of row 49: reboot, or replug.",
        )
    )  # fmt: skip
    found += _clock(before, after, during, facts) + _healthy(before, facts)
    reasons = sorted(
        {
            r
            for x in (before.get("load_throttle_reasons"), after.get("load_throttle_reasons"), during.get("slowdowns"))
            for r in x or []
            if r in SLOWDOWNS
        }
    )
    found.append(
        _said(
            "slowdowns while it ran", not reasons, len(reasons), "0", "",
            f"The clock was held down: {', '.join(reasons)}.",
        )
    )  # fmt: skip
    return found


def _said(name: str, passed: bool, value: float | int | None, bound: str, unit: str, detail: str) -> Assertion:
    """An assertion about speed; its sentence is there only where it was missed."""
    return Assertion(
        name=name, passed=passed, value=value, bound=bound, unit=unit, detail="" if passed else detail, about="speed"
    )


def _drift(key: str, before: float, after: float) -> Assertion:
    name, unit, band = BANDS[key]
    moved = after / before - 1 if before else float("inf")
    return _said(
        f"{name} canary after, against before", abs(moved) <= band, round(100 * moved, 1), f"within {band:.0%}", "%",
        f"The {name} canary moved from {before:g} to {after:g} {unit} while it ran; let the machine idle, and run it again.",
    )  # fmt: skip


def _clock(before: dict[str, Any], after: dict[str, Any], during: dict[str, Any], facts: Facts) -> list[Assertion]:
    """Row 48: the clock under load of both canaries; what NVML does not tell is not judged."""
    seen = [x["load_clock_mhz"] for x in (before, after) if x.get("load_clock_mhz") is not None]
    if not seen:
        return []
    band = LORE.canary.get(facts.gpu.compute_capability or "") if facts.gpu is not None and facts.is_target else None
    most = during.get("max_clock_mhz")
    least = float(band.clock_mhz) if band else LOW_CLOCK * most if most else None
    if least is None:
        return []
    low = min(seen)
    power = min((x["load_power_w"] for x in (before, after) if x.get("load_power_w") is not None), default=None)
    drawn = f" at {power:.0f} W" if power is not None else ""
    return [
        _said(
            "clock under load", low >= least, low, f">= {least:.0f}", "MHz",
            f"The clock under load was {low} MHz{drawn}, as in the low-power state of row 48: unplug the supply for a minute.",
        )
    ]  # fmt: skip


def _healthy(before: dict[str, Any], facts: Facts) -> list[Assertion]:
    """On a Spark, the lowest figures of a healthy one."""
    band = LORE.canary.get(facts.gpu.compute_capability or "") if facts.gpu is not None and facts.is_target else None
    if band is None:
        return []
    found = []
    for key, (name, unit, _) in BANDS.items():
        if key in before:
            value, least = before[key], getattr(band, key)
            found.append(
                _said(
                    f"{name} canary", value >= least, value, f">= {least:g}", unit,
                    f"The {name} canary gave {value:g} {unit}; a healthy device has {least:g} or more.",
                )
            )  # fmt: skip
    return found
