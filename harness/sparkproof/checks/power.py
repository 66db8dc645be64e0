"""Does the device run as fast as it is, under load? What an idle machine cannot show."""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.gpu import NO_USABLE_GPU, SLOWDOWNS
from sparkproof.checks.lore import LORE
from sparkproof.checks.lore import Canary as Band
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.facts.tried import Canaries
from sparkproof.results import ReasonClass

LOW_CLOCK = 0.45  # of the highest, where no figure of the device is published
LOW_GEMV = (
    0.45  # of the copy's bandwidth: the slow state has 0.37, a healthy Spark 1.2, and libraries differ in between
)


@check("power.clock")
def clock(facts: Facts) -> Answer:
    """Row 48."""
    ready = _ready(facts)
    if not isinstance(ready, Canaries):
        return ready
    gpu, mhz = facts.gpus[0], ready.load_clock_mhz
    if mhz is None:
        return NotRead("the clock under load, which NVML does not tell")
    reasons = [r for r in ready.load_throttle_reasons if r in SLOWDOWNS]
    power = f", {ready.load_power_w:.0f} W" if ready.load_power_w is not None else ""
    heat = f", {ready.load_temperature_c:.0f} C" if ready.load_temperature_c is not None else ""
    seen = f"{mhz} of {gpu.max_sm_clock_mhz or '?'} MHz after {ready.load_s:.0f} s of load{power}{heat}"
    seen += f"; reasons: {', '.join(reasons) or 'none given'}"
    band = _band(facts)
    if band is not None and mhz < band.clock_mhz:
        return Found(f"{seen}; a healthy one has {band.clock_mhz} MHz or more")
    if band is None and gpu.max_sm_clock_mhz and mhz < LOW_CLOCK * gpu.max_sm_clock_mhz:
        return Found(
            f"{seen}; that is under {LOW_CLOCK:.0%} of its highest",
            severity=Severity.WARNING,
            cause="A power or clock limit, heat, or the power supply holds the clock down.",
            fix="nvidia-smi -q -d PERFORMANCE,CLOCK,POWER",
        )
    return Ok(seen)


@check("power.canaries")
def canaries(facts: Facts) -> Answer:
    """Row 49: GEMV beside the copy, since the hidden slow state shows in one of them alone; and the matrix rate."""
    ready = _ready(facts)
    if not isinstance(ready, Canaries):
        return ready
    copy, gemv, gemm = ready.copy_gb_s, ready.gemv_gb_s, ready.gemm_tflops
    if copy is None or gemv is None:
        return NotRead("the canaries' timings")
    seen = f"copy {copy:.0f} GB/s, GEMV {gemv:.0f} GB/s, GEMM {f'{gemm:.0f} TFLOP/s' if gemm else 'not timed'}"
    if gemv < LOW_GEMV * copy:
        return Found(f"{seen}: GEMV is at {gemv / copy:.0%} of the copy")
    band = _band(facts)
    if band is None:
        return Ok(f"{seen}; no figures are published here for this device, so only their ratio was judged")
    low = [
        f"{name} {value:.0f} {unit}, a healthy one has {bound:.0f} or more"
        for name, value, bound, unit in (
            ("copy", copy, band.copy_gb_s, "GB/s"),
            ("GEMV", gemv, band.gemv_gb_s, "GB/s"),
            ("GEMM", gemm, band.gemm_tflops, "TFLOP/s"),
        )
        if value is not None and value < bound
    ]
    if low:
        return Found("; ".join(low), cause="The device is slower than it is: heat, power, or another program on it.")
    return Ok(seen)


@check("power.crashes")
def crashes(facts: Facts) -> Answer:
    """Row 50: boots that no shutdown came before."""
    if facts.gpu is None and not facts.has_nvidia_hardware:
        return NotApplicable("no NVIDIA GPU, so its power is not in question")
    if facts.os.in_container:
        return NotApplicable("this is a container, which does not see the machine's boots")
    if facts.history.crashes is None:
        return NotRead("the list of boots (`last`)")
    if not facts.history.crashes:
        return Ok("every boot of the last 30 days came after a shutdown")
    return Found(f"{facts.history.crashes} in the last 30 days, on {', '.join(facts.history.crash_dates)}")


def _ready(facts: Facts) -> Canaries | NotApplicable | NotRead:
    if facts.gpu is None or not facts.gpu.usable_by_torch:
        return NO_USABLE_GPU
    found = facts.tried.canaries
    if found is None:
        return NotRead("the canaries, which were not run")
    if found.error and "above the floor" in found.error:
        return NotApplicable(f"the canaries were not run: {found.error}", ReasonClass.MEMORY)
    return NotRead(f"the canaries: {found.error}") if found.error else found


def _band(facts: Facts) -> Band | None:
    return LORE.canary.get(facts.gpus[0].compute_capability or "") if facts.is_target else None
