"""Runs a `kernel` scenario: an op proven right, its tests proven sharp, its configurations proven to fit, or its speed.

Correctness runs on the GPU where torch can use one, and in Triton's interpreter otherwise; the result's mode and a
notice say which. Mutants always run in the interpreter (`judge.selftest` says why). Compilation needs no GPU. Whatever
runs kernels has a process of its own.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sparkproof.judge.selftest import INTERPRETED, chosen
from sparkproof.results import Assertion, CaseResult, Measurement, ReasonClass, Verdict
from sparkproof.runners.base import Context
from sparkproof.runners.kernel_speed import judge_speed
from sparkproof.scenario import Case, KernelScenario

ENTRY = "sparkproof.runners.kernel_child:main"
ARCHS_SECONDS = 600


def run(case: Case, context: Context) -> CaseResult:
    """Run the case to its end and say what was seen."""
    scenario = case.scenario
    assert isinstance(scenario, KernelScenario)
    spec = chosen([scenario.op])[scenario.op]  # UserError for an unknown op
    if scenario.variant and scenario.variant not in spec.variants:
        from sparkproof.errors import UserError

        raise UserError(f"{scenario.op} has no variant '{scenario.variant}'.", f"Known: {', '.join(spec.variants)}.")
    result = CaseResult(name=case.name, kind=case.kind, verdict=Verdict.BROKEN)
    if scenario.task == "compile":
        return _compile(scenario, result, context)
    return _spawn(case, scenario, result, context)


def _spawn(case: Case, scenario: KernelScenario, result: CaseResult, context: Context) -> CaseResult:
    gpu = context.facts.gpu
    on_gpu = gpu is not None and bool(gpu.usable_by_torch)
    if scenario.task == "mutants":  # the judge is on trial, not the device
        on_gpu = False
    env = {"TRITON_INTERPRET": "0"} if on_gpu else INTERPRETED
    result.mode = "gpu" if on_gpu else "host" if scenario.task == "mutants" else "interpreter"
    if result.mode == "interpreter":
        result.notices.append("No GPU: the kernels ran in Triton's interpreter on the CPU, not as compiled code.")
    payload = {"task": scenario.task, "op": scenario.op, "dtype": scenario.dtype, "variant": scenario.variant}
    outcome = context.spawn(ENTRY, payload, case=case, phase=scenario.task, timeout_s=scenario.timeout_s, env=env)
    result.output_tail = outcome.output_tail
    if outcome.status != "ok":
        result.reason = outcome.sentence(f"The {scenario.task} case")
        result.traceback = outcome.traceback
        result.verdict = Verdict.FAILED if outcome.blames_device else Verdict.BROKEN
        result.next_step = f"See {outcome.log}."
        return result
    if why := outcome.result.get("unable"):
        result.verdict, result.reason_class, result.reason = Verdict.SKIPPED, ReasonClass.SOFTWARE, f"{why}."
        result.next_step = "pip install triton==3.8.0, or 'numpy<2.4'"
        return result
    judged = {"correctness": _correctness, "mutants": _mutants, "speed": judge_speed}[scenario.task]
    return judged(scenario, result, outcome.result)


def _correctness(scenario: KernelScenario, result: CaseResult, document: dict[str, Any]) -> CaseResult:
    """One assertion for each output and kind of promise, each naming its worst family."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for check in document["checks"]:
        groups[check["of"], check["what"]].append(check)
    for (of, what), checks in groups.items():
        worst = max(checks, key=lambda c: (not c["passed"], c["value"] or 0.0))
        bad = sum(not c["passed"] for c in checks)
        count = f"{len(checks) - bad} of {len(checks)} held" if bad else f"all {len(checks)} held"
        number = worst["value"]
        result.assertions.append(
            Assertion(
                name=f"{of}: {what}",
                passed=bad == 0,
                value=round(number, 4) if number is not None else count,
                bound="<= 1 (error / allowed; allowed is twice plain PyTorch's, plus a floor)"
                if number is not None
                else "",
                detail=f"{count}; {'worst' if number is not None or bad else 'such as'}: {worst['where']}: {worst['detail']}",
            )
        )
        if number is not None:
            result.measurements.append(
                Measurement(
                    name=f"{of}: worst error",
                    value=number,
                    unit="of what is allowed",
                    higher_is_better=False,
                    conditions={"mode": document["mode"], "family": worst["where"], "checks": len(checks)},
                )
            )
    result.notices += [f"Not run: {text}." for text in document["not_run"]]
    result.evidence = {
        "checks": len(document["checks"]),
        "families": sorted({c["where"] for c in document["checks"]}),
        "failed": [c for c in document["checks"] if not c["passed"]][:50],
    }
    result.verdict, result.reason = CaseResult.decide(result.assertions)
    if result.verdict is Verdict.FAILED:
        result.next_step = f"Read the worst family above; the op is kernels/sparktune/ops/{scenario.op}.py."
    return result


def _mutants(scenario: KernelScenario, result: CaseResult, row: dict[str, Any]) -> CaseResult:
    """Every planted fault found; the kill rate is a figure of its own."""
    if row["error"]:
        result.reason = row["error"]
        result.next_step = f"Mend the table MUTANTS in kernels/sparktune/ops/{scenario.op}.py."
        return result  # broken: the table proves nothing
    for m in row["mutants"]:
        text = f"{m['description']}: {m['by']}"
        result.assertions.append(
            Assertion(name=f"mutant {m['id']} is caught", passed=m["killed"], value=m["killed"], detail=text)
        )
    result.measurements.append(
        Measurement(
            name="mutants killed",
            value=100.0 * row["killed"] / row["total"] if row["total"] else 0.0,
            unit="%",
            higher_is_better=True,
            conditions={"killed": row["killed"], "total": row["total"], "mode": result.mode},
        )
    )
    result.evidence = {"mutants": row["mutants"], "survivors": row["survivors"]}
    result.verdict, result.reason = CaseResult.decide(result.assertions)
    if result.verdict is Verdict.FAILED:
        result.next_step = "Sharpen the judge or the op's sizes until the survivors die; never drop the mutant."
    return result


def _compile(scenario: KernelScenario, result: CaseResult, context: Context) -> CaseResult:
    """Every configuration fits every target; one assertion for each kernel and target."""
    from sparkproof.judge import aot

    result.mode = "ahead-of-time"
    document = aot.compile_all(
        scenario.arch, [scenario.op], progress=context.progress, timeout_s=min(scenario.timeout_s, ARCHS_SECONDS)
    )
    rows = [r for r in document["configurations"] if not scenario.variant or r["variant"] == scenario.variant]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["arch"], row["kernel"]].append(row)
    for (arch, kernel), found in groups.items():
        bad = [r for r in found if not r["passed"]]
        one = bad[0] if bad else max(found, key=lambda r: r["registers"])
        limits = f"<= {one['shared_limit']} bytes shared, {one['registers_limit']} registers, 0 bytes spilled"
        seen = one["reason"] or (
            f"most registers {one['registers']}, most shared memory {max(r['shared_bytes'] for r in found)} bytes, no spills"
        )
        result.assertions.append(
            Assertion(
                name=f"{kernel} fits {arch}",
                passed=not bad,
                value=f"{len(found) - len(bad)} of {len(found)} configurations",
                bound=limits,
                detail=f"{one['configuration']}, {one['dtype']}: {seen}",
            )
        )
        for key, unit in (("registers", "registers a thread"), ("shared_bytes", "bytes")):
            value = max((r[key] or 0 for r in found), default=0)
            name = f"{kernel} {arch}: most {key.replace('_', ' ')}"
            result.measurements.append(Measurement(name=name, value=value, unit=unit, higher_is_better=False))
    result.evidence = {"configurations": rows, "triton": document["triton"]}
    result.verdict, result.reason = CaseResult.decide(result.assertions)
    if result.verdict is Verdict.FAILED:
        result.next_step = f"Make the heuristic in kernels/sparktune/ops/{scenario.op}.py choose a smaller block."
    return result
