"""Which function is which check, and how a check says what it saw."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from sparkproof.checks.catalogue import CATALOGUE, TOPICS
from sparkproof.checks.finding import Finding, Outcome, Severity
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass


@dataclass(frozen=True)
class Ok:
    """Looked, and nothing was wrong; `seen` is the evidence."""

    seen: str


@dataclass(frozen=True)
class Found:
    """The failure is there. What is left None comes from the catalogue."""

    evidence: str
    severity: Severity | None = None
    cause: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class NotApplicable:
    """This machine cannot have the failure; `lacks` says what a skipped case would be for want of."""

    why: str
    lacks: ReasonClass = ReasonClass.PLATFORM


@dataclass(frozen=True)
class NotRead:
    """The facts that the check needs were not read."""

    what: str


LATE = "no answer within"  # how `facts.host` words a time limit that was met


def unanswered(what: str, error: str | None) -> NotRead | None:
    """For a trial that met its time limit: a busy machine does that too, so it is no failure and has no cure."""
    if not error or LATE not in error:
        return None
    return NotRead(f"{what}: {error}; a busy machine does that too, so try again when it is idle")


Answer = Ok | Found | NotApplicable | NotRead | list[Found]
Check = Callable[[Facts], Answer]
CHECKS: dict[str, Check] = {}


def check(check_id: str) -> Callable[[Check], Check]:
    """Register a function as the check with this id of the catalogue."""
    if check_id not in CATALOGUE:
        raise KeyError(f"{check_id} is not in the catalogue")

    def register(function: Check) -> Check:
        CHECKS[check_id] = function
        return function

    return register


def evaluate(check_id: str, facts: Facts) -> Outcome:
    """Run one check and complete its answer from the catalogue."""
    _load()
    entry = CATALOGUE[check_id]
    answer = CHECKS[check_id](facts)
    outcome = Outcome(check=entry.id, topic=entry.topic, title=entry.title, state="found", seen="")
    match answer:
        case Ok(seen):
            return outcome.model_copy(update={"state": "ok", "seen": seen})
        case NotApplicable(why, lacks):
            return outcome.model_copy(update={"state": "not applicable", "seen": why, "lacks": lacks})
        case NotRead(what):
            return outcome.model_copy(update={"state": "not read", "seen": f"not read: {what}"})
    found = answer if isinstance(answer, list) else [answer]
    if not found:
        raise ValueError(f"{check_id} answered with an empty list instead of Ok with what it saw")
    findings = [
        Finding(
            check=entry.id,
            rows=entry.rows,
            severity=f.severity or entry.severity,
            title=entry.title,
            evidence=f.evidence,
            cause=entry.cause if f.cause is None else f.cause,
            fix=entry.fix if f.fix is None else f.fix,
            source=entry.source,
        )
        for f in found
    ]
    return outcome.model_copy(update={"seen": "; ".join(f.evidence for f in findings), "findings": findings})


def run_checks(facts: Facts, topic: str = "all") -> list[Outcome]:
    """Every check of a topic, in the order of the catalogue."""
    require_topic(topic)
    return [evaluate(e.id, facts) for e in CATALOGUE.values() if topic in ("all", e.topic)]


def require_topic(topic: str) -> None:
    """UserError for a topic that there is not."""
    if topic != "all" and topic not in TOPICS:
        near = difflib.get_close_matches(topic, [*TOPICS, "all"], n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise UserError(f"There is no topic of checks called '{topic}'.", f"{hint}Topics: all, {', '.join(TOPICS)}.")


def worst_first(outcomes: list[Outcome]) -> list[Finding]:
    """All findings, errors before warnings before harmless ones, else in the order of the catalogue."""
    return sorted((f for o in outcomes for f in o.findings), key=lambda f: f.severity.rank)


def _load() -> None:
    """Import every topic's file, which registers its checks."""
    for topic in TOPICS:
        importlib.import_module(f"sparkproof.checks.{topic}")
