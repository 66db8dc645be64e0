"""Runner of `fit` cases: the largest batch at each context, in a process of its own under the watchdog."""

from __future__ import annotations

import shutil
import time
from typing import Any

from sparkproof.errors import UserError
from sparkproof.results import Assertion, CaseResult, Measurement, Verdict
from sparkproof.runners.base import Context
from sparkproof.runners.gate_kernels import judge_kernels
from sparkproof.runners.one_model import described, source_of
from sparkproof.runners.process import Outcome
from sparkproof.runners.train import ENVIRONMENT
from sparkproof.scenario import Case, FitScenario, TrainScenario


def run(case: Case, context: Context) -> CaseResult:
    """Search, and judge that nothing ran out. Errors: UserError for what is missing."""
    s = case.scenario
    assert isinstance(s, FitScenario)
    source = source_of(s, context.cases)
    folder, deadline = context.case_dir(case), time.monotonic() + s.timeout_s
    checkpoint = folder / "checkpoint"
    payload = {
        "scenario": s.model_dump(mode="json"), "source": source.model_dump(mode="json") if source else None,
        "cache_dir": str(context.cache_dir), "folder": str(checkpoint), "work": str(folder / "files"),
        "floor_gib": context.memory_floor_gib,
    }  # fmt: skip

    def phase(name: str, entry: str) -> Outcome:
        left = max(1.0, deadline - time.monotonic())
        return context.spawn(entry, payload, case=case, phase=name, timeout_s=left, env=ENVIRONMENT)

    shutil.rmtree(checkpoint, ignore_errors=True)
    try:
        if s.shape:
            made = phase("prepare", "sparkproof.runners.one_model:prepare")
            if made.status != "ok":
                raise RuntimeError(made.sentence("writing the checkpoint"))
        outcome = phase("fit", "sparkproof.runners.fit_child:fit")
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
    if outcome.status == "ok" and "user_error" in outcome.result:
        e = outcome.result["user_error"]
        raise UserError(e["message"], e["fix"], skip_class=e["skip_class"])
    return judge(case, source, outcome)


def judge(case: Case, source: TrainScenario | None, outcome: Outcome) -> CaseResult:
    """What the search must show: it ended, ran out of nothing, kept to its limit, with the engine's own kernels."""
    s = case.scenario
    assert isinstance(s, FitScenario)
    family, model = described(s, source)
    if outcome.status != "ok":
        told = outcome.sentence("the search")
        return CaseResult(
            name=case.name, kind="fit", verdict=Verdict.FAILED if outcome.blames_device else Verdict.BROKEN, reason=told,
            next_step="Free memory, or give the scenario a `limit_gib`.", output_tail=outcome.output_tail,
            assertions=[Assertion(name="the search ends by itself", passed=False, detail=told)],
        )  # fmt: skip
    seen = outcome.result
    rows, limit = seen["rows"], seen["limit_gib"]
    assertions = [
        Assertion(
            name="nothing ran out of memory", passed=not seen["ran_out"], value=not seen["ran_out"],
            detail=seen["ran_out"],
        ),
        Assertion(
            name="contexts searched", passed=len(rows) == len(set(s.contexts)), value=len(rows),
            bound=str(len(set(s.contexts))),
        ),
        Assertion(
            name="largest batch at the shortest context", passed=bool(rows) and rows[0]["batch"] >= 1,
            value=rows[0]["batch"] if rows else 0, bound=">= 1", detail=rows[0]["why"] if rows else "",
        ),
        *judge_kernels(s.engine, seen["ran"]),
    ]  # fmt: skip
    peaks = [t["measured"] for r in rows for t in r["tried"]]
    if peaks:
        assertions.append(
            Assertion(
                name="highest peak of all that was tried", passed=max(peaks) <= limit, value=round(max(peaks), 3),
                bound=f"<= {limit:.3f}", unit="GiB",
            )
        )  # fmt: skip
    verdict, reason = CaseResult.decide(assertions)
    mode = seen["ran"]["mode"]
    bits, kept = "NF4" if s.load_in_4bit else "16 bits", "on" if s.checkpointing else "off"
    subject = {
        "family": family, "model": model, "engine": s.engine, "limit_gib": limit,
        "settings": f"{bits}, rank {s.rank}, checkpointing {kept}",
    }  # fmt: skip
    return CaseResult(
        name=case.name, kind="fit", verdict=verdict, reason=reason, assertions=assertions, mode=mode,
        next_step="" if verdict is Verdict.PASSED else "Give the scenario a lower `limit_gib`, and report the planner's error.",
        measurements=_measurements(s, rows, limit, mode),
        notices=[] if mode == "gpu" else ["No GPU: resident memory of the CPU's process, which says nothing about a GPU."],
        evidence={"subject": subject, "fits": [{k: v for k, v in r.items() if k != "tried"} for r in rows],
                  "tried": [{"context": r["context"], **t} for r in rows for t in r["tried"]]},
    )  # fmt: skip


def _measurements(s: FitScenario, rows: list[dict[str, Any]], limit: float, mode: str) -> list[Measurement]:
    found = []
    for r in rows:
        conditions = {"engine": s.engine, "mode": mode, "context": r["context"], "limit_gib": limit}
        found.append(
            Measurement(
                name=f"largest batch at {r['context']} tokens", value=float(r["batch"]), unit="rows",
                higher_is_better=True, conditions=conditions,
            )
        )  # fmt: skip
        if r["peak_gib"] is not None:
            found.append(
                Measurement(
                    name=f"peak memory at {r['batch']} x {r['context']} tokens", value=r["peak_gib"], unit="GiB",
                    higher_is_better=False, reference=r["planned_gib"], reference_name="sparktune.plan before measuring",
                    conditions=conditions,
                )
            )  # fmt: skip
    return found
