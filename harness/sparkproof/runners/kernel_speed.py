"""Turns the timings of a kernel case into assertions, measurements and a verdict that can be `retest`."""

from __future__ import annotations

from typing import Any

from sparkproof.results import Assertion, CaseResult, Measurement, Verdict
from sparkproof.scenario import KernelScenario


def judge_speed(scenario: KernelScenario, result: CaseResult, d: dict[str, Any]) -> CaseResult:
    """Fast enough by this device's own copy bandwidth, not slower than plain PyTorch, and measured under a steady clock."""
    copy, trusted = d["copy"], bool(d["trusted"])
    steady = {
        "device": d["device"],
        "mode": "gpu",
        "dims": d["dims"],
        "copy_drift": copy["drift"],
        "dtype": scenario.dtype,
    }
    ran = d["watermarks"]
    result.assertions.append(
        Assertion(
            name="the Triton kernel was timed", passed=ran["triton"] > 0 and ran["reference"] == 0, value=str(ran)
        )
    )
    result.assertions.append(
        Assertion(
            name="copy canary steady",
            passed=trusted,
            value=round(100 * copy["drift"], 2),
            unit="%",
            about="speed",
            bound=f"within {100 * copy['band']:.0f}% of before",
            detail="Copy bandwidth after the case, against before.",
        )
    )
    for which, p in d["passes"].items():
        fraction, bandwidth = p["copy_fraction"], p["gb_s"]
        if scenario.min_copy_fraction:
            result.assertions.append(
                Assertion(
                    name=f"{which} reaches its share of copy bandwidth",
                    about="speed",
                    passed=fraction["high"] >= scenario.min_copy_fraction,
                    value=round(fraction["value"], 3),
                    bound=f">= {scenario.min_copy_fraction}",
                    detail=f"{bandwidth['value']:.0f} GB/s; 95% interval {fraction['low']:.3f} to {fraction['high']:.3f}.",
                )
            )
        if scenario.min_matrix_fraction and p["matrix_fraction"]:
            rate, of = p["matrix_fraction"], p["tflop_s"]["value"]
            result.assertions.append(
                Assertion(
                    name=f"{which} reaches its share of the matrix rate",
                    about="speed",
                    passed=rate["high"] >= scenario.min_matrix_fraction,
                    value=round(rate["value"], 3),
                    bound=f">= {scenario.min_matrix_fraction}",
                    detail=f"{of:.0f} TFLOP/s; 95% interval {rate['low']:.3f} to {rate['high']:.3f}.",
                )
            )
            result.measurements.append(
                Measurement(
                    name=f"{which} share of the matrix rate",
                    value=100 * rate["value"],
                    unit="%",
                    higher_is_better=True,
                    low=100 * rate["low"],
                    high=100 * rate["high"],
                    conditions=steady,
                )
            )
        plain = p["speedup"]["plain PyTorch"]
        result.assertions.append(
            Assertion(
                name=f"{which} is not slower than plain PyTorch",
                about="speed",
                passed=plain["high"] >= 1,
                value=round(plain["value"], 2),
                unit="x",
                bound=">= 1",
                detail="; ".join(p["sentences"]) + ".",
            )
        )
        result.measurements += [
            Measurement(
                name=f"{which} bandwidth",
                value=bandwidth["value"],
                unit="GB/s",
                higher_is_better=True,
                samples=bandwidth["samples"],
                low=bandwidth["low"],
                high=bandwidth["high"],
                reference=_middle(copy["before"]),
                reference_name="copy bandwidth of this device",
                conditions=steady,
            ),
            Measurement(
                name=f"{which} share of copy bandwidth",
                value=100 * fraction["value"],
                unit="%",
                higher_is_better=True,
                low=100 * fraction["low"],
                high=100 * fraction["high"],
                conditions=steady,
            ),
            *(
                Measurement(
                    name=f"{which} time, {engine}",
                    value=t["value"],
                    unit="ms",
                    higher_is_better=False,
                    samples=t["samples"],
                    low=t["low"],
                    high=t["high"],
                    conditions=steady,
                )
                for engine, t in p["ms"].items()
            ),
        ]
        result.notices += p["notes"]
    result.evidence = {k: d[k] for k in ("device", "dims", "input_sets", "watermarks", "variant")}
    result.evidence["copy_gb_s"] = {"before": copy["before"], "after": copy["after"]}
    result.verdict, result.reason = CaseResult.decide(result.assertions, speed_trusted=trusted)
    if not trusted:
        result.next_step = "Let the machine idle and cool, end other GPU work, then rerun."
    elif result.verdict is Verdict.FAILED:
        result.next_step = (
            "Run it again on an idle machine; if it misses again, `sparkproof doctor` looks for low clocks."
        )
    return result


def _middle(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 2]
