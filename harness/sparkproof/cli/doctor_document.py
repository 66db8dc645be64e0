"""The doctor's answer for programs: `sparkproof doctor --json`, with a schema that is committed as
reports/schema/doctor-1.json."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import ConfigDict, Field

from sparkproof.checks.finding import Finding, Outcome, Severity
from sparkproof.checks.registry import worst_first
from sparkproof.facts.account import Account, account
from sparkproof.facts.model import Facts
from sparkproof.results import Strict

SCHEMA_ID = "doctor-1.json"


class Judged(Strict):
    """How one check went."""

    check: str = Field(description="Its id.")
    topic: str = Field(description="The part of the id before the dot.")
    state: Literal["ok", "found", "not applicable", "not read"]
    seen: str = Field(description="What was looked at and seen, or why the check says nothing.")


class Command(Strict):
    """One command to give."""

    check: str = Field(description="The check whose finding it cures.")
    command: str


class DoctorDocument(Strict):
    """One examination."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: Literal["sparkproof-doctor-1"] = Field(default="sparkproof-doctor-1", alias="schema")
    machine: str = Field(description="The machine in a few words.")
    origin: str = Field(description="When and where the facts were read, or what they were constructed from.")
    is_target: bool = Field(description="A GB10-class machine, by its properties.")
    verdict: Literal["passed", "failed"] = Field(description="failed: an error was found; or, with --strict, more.")
    strict: bool = Field(description="Warnings, and checks that could not be judged, fail too.")
    exit_code: int = Field(description="0 passed, 1 failed.")
    counts: dict[str, int] = Field(description="Findings by severity, and checks by state.")
    findings: list[Finding] = Field(description="Worst first.")
    checks: list[Judged] = Field(description="Every check that was made, in the order of the catalogue.")
    commands: list[Command] = Field(description="The fixes in the order to give them; none was run.")
    next: str = Field(description="The one thing to do next.")
    memory: Account | None = Field(description="Where memory is, and what a run may take of it.")
    not_read: dict[str, str] = Field(description="Probe -> why it read nothing.")


def document(facts: Facts, outcomes: list[Outcome], strict: bool) -> DoctorDocument:
    """Put an examination together."""
    findings = worst_first(outcomes)
    code = exit_code(outcomes, strict)
    counts = {s.value: sum(f.severity is s for f in findings) for s in Severity}
    for state in ("ok", "found", "not applicable", "not read"):
        counts[state] = sum(o.state == state for o in outcomes)
    return DoctorDocument(
        machine=facts.device_sentence(),
        origin=facts.origin,
        is_target=facts.is_target,
        verdict="failed" if code else "passed",
        strict=strict,
        exit_code=code,
        counts=counts,
        findings=findings,
        checks=[Judged(check=o.check, topic=o.topic, state=o.state, seen=o.seen) for o in outcomes],
        commands=[Command(check=check, command=command) for check, command in commands(outcomes)],
        next=next_step(outcomes),
        memory=account(facts),
        not_read=facts.errors,
    )


def exit_code(outcomes: list[Outcome], strict: bool) -> int:
    """1 for an error; with `strict` for a warning, or a check that could not be judged, as well."""
    severities = {f.severity for f in worst_first(outcomes)}
    if Severity.ERROR in severities:
        return 1
    return int(strict and (Severity.WARNING in severities or any(o.state == "not read" for o in outcomes)))


def commands(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    """Check and command of every finding that is not harmless, worst first, each command once."""
    found: dict[str, str] = {}
    for f in worst_first(outcomes):
        if f.fix and f.severity is not Severity.INFO:
            found.setdefault(f.fix, f.check)
    return [(check, command) for command, check in found.items()]


def next_step(outcomes: list[Outcome]) -> str:
    """The fix of the worst finding, else what would make more judgeable, else the validation."""
    findings = worst_first(outcomes)
    worst = findings[0] if findings else None
    if worst is not None and worst.severity is not Severity.INFO:
        return worst.fix or worst.title
    if any(o.state == "not read" for o in outcomes):
        return "sparkproof facts  # shows why something could not be read"
    return "sparkproof validate"


def doctor_schema() -> str:
    """The text of reports/schema/doctor-1.json."""
    schema = DoctorDocument.model_json_schema(mode="serialization", by_alias=True)
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
