"""Runs an `environment` scenario: the checks of a topic on the run's Facts, one assertion for each that reached a
conclusion.

A check that does not apply to this machine, or whose facts were not read, asserts nothing: it stands in the evidence
as that and is never counted as passed. If none of a topic applies, the case is skipped and says what the machine
lacks.
"""

from __future__ import annotations

from sparkproof.checks.finding import Finding, Outcome, Severity
from sparkproof.checks.registry import run_checks, worst_first
from sparkproof.results import Assertion, CaseResult, Verdict
from sparkproof.runners.base import Context
from sparkproof.scenario import Case, EnvironmentScenario


def run(case: Case, context: Context) -> CaseResult:
    """Judge the facts that the run already has; nothing is read again."""
    scenario = case.scenario
    assert isinstance(scenario, EnvironmentScenario)
    outcomes = run_checks(context.facts, scenario.topic)
    findings = worst_first(outcomes)
    result = CaseResult(name=case.name, kind=case.kind, verdict=Verdict.BROKEN, mode="host")
    result.assertions = [_assertion(o, context.strict) for o in outcomes if o.judged]
    result.evidence = {
        "machine": context.facts.device_sentence(),
        "facts": context.facts.origin,
        "checks": {o.check: {"state": o.state, "seen": o.seen} for o in outcomes},
        "findings": [f.model_dump(mode="json") for f in findings],
    }
    result.notices = [_notice(f) for f in findings if f.severity is not Severity.ERROR]
    result.notices += [f"{o.check} could not be judged: {o.seen}." for o in outcomes if o.state == "not read"]
    if not result.assertions:
        return _nothing_judged(result, outcomes)
    result.verdict, result.reason = CaseResult.decide(result.assertions)
    if result.verdict is Verdict.FAILED:
        result.next_step = next(
            (f.fix for f in findings if f.severity is not Severity.INFO and f.fix), findings[0].cause
        )
    return result


def _assertion(outcome: Outcome, strict: bool) -> Assertion:
    """A warning fails a strict run alone; a harmless finding none."""
    worst = outcome.worst
    bad = (Severity.ERROR, Severity.WARNING) if strict else (Severity.ERROR,)
    failed = worst is not None and worst.severity in bad
    return Assertion(
        name=f"{outcome.check} ({outcome.title})" if failed else outcome.check,
        passed=not failed,
        value=worst.severity.value if worst is not None else "nothing found",
        bound=f"no finding of severity {' or '.join(bad)}",
        detail=outcome.seen,
    )


def _notice(finding: Finding) -> str:
    word = "Harmless" if finding.severity is Severity.INFO else "Warning"
    cure = f" Fix: {finding.fix}" if finding.fix else ""
    return f"{word}: {finding.title} ({finding.check}): {finding.evidence}.{cure}"


def _nothing_judged(result: CaseResult, outcomes: list[Outcome]) -> CaseResult:
    """Skipped if the machine cannot have these failures; broken if it may, and the facts are missing."""
    unread = [o for o in outcomes if o.state == "not read"]
    if unread:
        result.verdict = Verdict.BROKEN
        result.reason = f"No check could be judged: {'; '.join(f'{o.check}: {o.seen}' for o in unread)}."
        result.next_step = "sparkproof facts"
        return result
    result.verdict, result.reason_class = Verdict.SKIPPED, outcomes[0].lacks
    result.reason = f"No check of this topic applies to this machine: {outcomes[0].seen}."
    result.next_step = "Nothing is wrong here; run it on a machine that has what it needs."
    return result
