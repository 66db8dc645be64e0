"""From the blocks of each engine to ratios: who is right, how fast each is against hf, with how much of its memory. Pure."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from sparkproof.bench.train.compare import LOSS_BOUND, NORM_BOUND
from sparkproof.facts.model import Facts
from sparkproof.judge import nested
from sparkproof.judge.stats import Interval
from sparkproof.judge.steady import steady
from sparkproof.results import Assertion, CaseResult, Measurement, Verdict
from sparkproof.runners.gate_kernels import judge_kernels
from sparkproof.runners.one_model import described
from sparkproof.scenario import Case, ComparisonScenario, TrainScenario

REFERENCE = "hf"


@dataclass
class Side:
    """What one engine's process left: what it saw, or why it is missing, or how it failed."""

    name: str
    seen: dict[str, Any] = field(default_factory=dict)
    missing: str = ""
    failed: str = ""
    log: str = ""
    machine_gib: float = 0.0

    @property
    def blocks(self) -> list[list[float]]:
        """Milliseconds of each step, a list a block."""
        return [b["ms"] for b in self.seen["blocks"]]


def judge(
    case: Case, source: TrainScenario | None, sides: list[Side], canaries: dict[str, dict[str, Any]], facts: Facts
) -> CaseResult:
    """Assertions, measurements and the rows of the report's table."""
    s = case.scenario
    assert isinstance(s, ComparisonScenario)
    by_name = {x.name: x for x in sides}
    hf = by_name[REFERENCE]
    on_gpu = any(x.seen and x.seen["ran"]["mode"] == "gpu" for x in sides)
    assertions: list[Assertion] = []
    rows = []
    for side in sides:
        found = [] if side.missing else _assertions(side, hf)
        assertions += found
        rows.append(_row(side, hf, found, s, canaries.get("before") or {}))
    if on_gpu:
        assertions += steady(canaries["before"], canaries["after"], _during(sides), facts)
    trusted = all(a.passed for a in assertions if a.about == "speed")
    verdict, reason = CaseResult.decide(assertions, speed_trusted=trusted)
    failed = next((x for x in sides if x.failed), None)
    return CaseResult(
        name=case.name, kind="comparison", verdict=verdict, reason=reason, next_step=_next_step(verdict, failed, rows),
        assertions=assertions, measurements=_measurements(sides, rows, s, canaries.get("before") or {}, on_gpu),
        notices=_notices(sides, on_gpu), mode="gpu" if on_gpu else "host", output_tail=failed.log if failed else "",
        evidence={
            "subject": {**subject(s, source), "architecture": hf.seen.get("architecture", "")}, "engines": rows,
            "canaries": canaries,
            "versions": hf.seen.get("versions", {}),
        },
    )  # fmt: skip


def subject(s: ComparisonScenario, source: TrainScenario | None) -> dict[str, str]:
    """The family, the model and the settings, as the report says them."""
    family, model = described(s, source)
    bits = "NF4" if s.load_in_4bit else "16 bits"
    settings = f"{model}, {bits}, {s.batch} x {s.seq_len} tokens, rank {s.rank}"
    settings += f", gradient checkpointing {'on' if s.checkpointing else 'off'}, 8-bit AdamW"
    return {"family": family, "model": model, "settings": settings}


def _assertions(side: Side, hf: Side) -> list[Assertion]:
    """It ran to its end, with its own kernels, and computed what hf computes."""
    name = side.name
    if side.failed:
        return [Assertion(name=f"{name} runs all its blocks", passed=False, detail=side.failed)]
    found = [Assertion(name=f"{name} runs all its blocks", passed=True, value=len(side.blocks))]
    for a in judge_kernels(name, side.seen["ran"]):
        found.append(a.model_copy(update={"name": a.name if name in a.name.lower() else f"{name}, {a.name}"}))
    loss, norm = side.seen["loss"], side.seen["norm"]
    finite = loss is not None and norm is not None
    found.append(Assertion(name=f"{name}: first loss and gradient norm are finite", passed=finite, value=finite))
    right = hf.seen.get("loss"), hf.seen.get("norm")
    if name == REFERENCE or not finite or right[0] is None or not right[1]:
        return found
    apart, relative = abs(loss - right[0]), abs(norm / right[1] - 1)
    return [
        *found,
        Assertion(
            name=f"{name}: first loss, distance from hf's", passed=apart <= LOSS_BOUND, value=apart,
            bound=f"<= {LOSS_BOUND:g}", unit="nats",
        ),
        Assertion(
            name=f"{name}: first gradient norm, distance from hf's", passed=relative <= NORM_BOUND,
            value=relative, bound=f"<= {NORM_BOUND:g}", unit="relative",
        ),
    ]  # fmt: skip


def _row(side: Side, hf: Side, found: list[Assertion], s: ComparisonScenario, before: dict[str, Any]) -> dict[str, Any]:
    """One engine's row of the table. status: timed, missing, failed, or wrong (shown, and not counted)."""
    row: dict[str, Any] = {"engine": side.name, "status": "timed", "why": ""}
    if side.missing or side.failed:
        return {**row, "status": "missing" if side.missing else "failed", "why": side.missing or side.failed}
    missed = next((a for a in found if not a.passed), None)
    if missed is not None:
        fell = missed.name in {a.name for a in found if "launches" in a.name or "calls that ran" in a.name}
        seen = f": {missed.value}, allowed {missed.bound}" if missed.bound else ""
        row |= {"status": "failed" if fell else "wrong", "why": f"{missed.name}{seen}. {missed.detail}".strip()}
    ms = [x for b in side.blocks for x in b]
    tokens = s.batch * s.seq_len
    middle = nested.median(side.blocks)
    row |= {
        "tokens_per_s": 1e3 * tokens / middle.value, "tokens_low": 1e3 * tokens / middle.high,
        "tokens_high": 1e3 * tokens / middle.low, "step_p50_ms": statistics.median(ms),
        "step_p95_ms": statistics.quantiles(ms, n=20, method="inclusive")[-1] if len(ms) > 1 else ms[0],
        "first_step_s": side.seen["first_step_s"],
    }  # fmt: skip
    memory = side.seen["memory"]
    row["peak_gib"] = memory.get("peak_gpu_allocated_gib", memory["peak_rss_gib"])
    row["reserved_gib"] = memory.get("peak_gpu_reserved_gib")
    row["machine_gib"] = side.machine_gib
    flops = side.seen["work"].get("flops")
    if flops and "gemm_tflops" in before:
        gemm, copy = before["gemm_tflops"] * 1e12, before["copy_gb_s"] * 1e9
        floor = flops / gemm + side.seen["work"]["bytes"] / copy
        row |= {"mfu": 1e3 * flops / middle.value / gemm, "light": 1e3 * floor / middle.value}
    joules = [b["during"].get("energy_j") for b in side.seen["blocks"]]
    if all(j is not None for j in joules):
        row["mj_a_token"] = 1e3 * sum(joules) / (tokens * len(ms))
    if side.name != REFERENCE and hf.seen and row["status"] == "timed":
        ratio = nested.ratio(hf.blocks, side.blocks)
        row |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        theirs = hf.seen["memory"]
        row["memory_share"] = row["peak_gib"] / theirs.get("peak_gpu_allocated_gib", theirs["peak_rss_gib"])
    return row


def _during(sides: list[Side]) -> dict[str, Any]:
    """What the sensors saw over all blocks: medians, and every slowdown."""
    seen = [b["during"] for x in sides if x.seen for b in x.seen["blocks"]]
    found: dict[str, Any] = {"slowdowns": sorted({r for d in seen for r in d.get("slowdowns", [])})}
    for key in ("clock_mhz", "power_w", "temperature_c", "max_clock_mhz"):
        values = [d[key] for d in seen if key in d]
        if values:
            found[key] = statistics.median(values)
    return found


def _measurements(
    sides: list[Side], rows: list[dict[str, Any]], s: ComparisonScenario, before: dict[str, Any], on_gpu: bool
) -> list[Measurement]:
    rounds = max((len(x.blocks) for x in sides if x.seen), default=0)
    conditions = {
        **{k: v for k, v in _during(sides).items() if k != "slowdowns"},
        **{f"canary_{k}": before[k] for k in ("copy_gb_s", "gemv_gb_s", "gemm_tflops") if k in before},
        "mode": "gpu" if on_gpu else "host", "batch": s.batch, "seq_len": s.seq_len, "rounds": rounds,
        "steps_a_block": s.steps,
    }  # fmt: skip
    found: list[Measurement] = []

    def add(
        name: str, row: dict[str, Any], key: str, unit: str, better: bool, factor: float = 1.0, **more: Any
    ) -> None:
        if row.get(key) is not None and math.isfinite(row[key]):
            more = {"conditions": {**conditions, "engine": row["engine"]}, **more}
            found.append(Measurement(name=name, value=factor * row[key], unit=unit, higher_is_better=better, **more))

    for side, row in zip(sides, rows, strict=True):
        if "tokens_per_s" not in row:
            continue
        e = side.name
        ms = [x for b in side.blocks for x in b]
        if "ratio" in row:
            add(f"{e}: times as fast as hf", row, "ratio", "x", True, low=row["ratio_low"], high=row["ratio_high"])
            add(f"{e}: memory against hf's", row, "memory_share", "x", False)
        rates = [1e3 * s.batch * s.seq_len / x for x in ms]
        add(
            f"{e}: tokens", row, "tokens_per_s", "tokens/s", True, samples=rates, low=row["tokens_low"],
            high=row["tokens_high"],
        )  # fmt: skip
        add(f"{e}: step, median", row, "step_p50_ms", "ms", False, samples=ms)
        add(f"{e}: step, 95th percentile", row, "step_p95_ms", "ms", False)
        add(f"{e}: MFU", row, "mfu", "% of GEMM", True, 100)
        add(f"{e}: speed of light", row, "light", "% of the floor", True, 100)
        add(f"{e}: energy a token", row, "mj_a_token", "mJ", False)
        add(f"{e}: peak memory", row, "peak_gib", "GiB", False)
        add(f"{e}: peak reserved", row, "reserved_gib", "GiB", False)
    return found


def _notices(sides: list[Side], on_gpu: bool) -> list[str]:
    found = [f"Without {x.name}: {x.missing}" for x in sides if x.missing]
    if not on_gpu:
        found.append("No GPU: this ran on the CPU, whose times and memory say nothing about a GPU's.")
    why = next((x.seen["work"]["why_not"] for x in sides if x.seen and "why_not" in x.seen["work"]), "")
    return [*found, f"No MFU and no speed of light: {why}."] if why and on_gpu else found


def _next_step(verdict: Verdict, failed: Side | None, rows: list[dict[str, Any]]) -> str:
    if verdict is Verdict.RETEST:
        return "Let the machine idle and cool, end other GPU work, then run it again."
    if verdict is Verdict.FAILED:
        wrong = failed.name if failed else next((r["engine"] for r in rows if r["status"] != "timed"), "")
        return f"Leave {wrong} out with `engines`, or run a train case with it alone." if wrong else ""
    return ""


def said(name: str) -> str:
    """An engine as a sentence calls it."""
    return {"unsloth": "Unsloth", "liger": "Liger"}.get(name, name)


def speed(ratio: Interval) -> str:
    """'1.44 ± 0.03 times as fast as hf', or that no difference was seen."""
    if ratio.spans(1.0):
        return f"showed no difference from hf in speed ({ratio.value:.2f} times, {ratio.low:.2f} to {ratio.high:.2f})"
    half = (ratio.high - ratio.low) / 2
    return f"was {ratio.value:.2f} ± {f'{half:.2f}' if half >= 0.005 else 'under 0.01'} times as fast as hf"
