"""`report.json`: the run for programs, with a versioned schema that is committed as `reports/schema/report-1.json`."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from sparkproof.report.record import spell_non_finite
from sparkproof.report.runrecord import Planned, ResumedLine, RunRecord
from sparkproof.report.verdict import Answer
from sparkproof.results import Assertion, CaseResult, Measurement, Strict

SCHEMA = "sparkproof-report-1"
SCHEMA_ID = "report-1.json"
Number = float | Literal["NaN", "Infinity", "-Infinity"]  # JSON has no spelling of its own for the last three


class ReportMeasurement(Measurement):
    """A measurement whose numbers may be none, spelt as strings."""

    value: Number  # type: ignore[assignment]
    samples: list[Number] = Field(default_factory=list, description="Raw samples, in the same unit, in order.")  # type: ignore[assignment]
    low: Number | None = Field(default=None, description="Lower end of the 95% interval.")  # type: ignore[assignment]
    high: Number | None = Field(default=None, description="Upper end of the 95% interval.")  # type: ignore[assignment]
    reference: Number | None = Field(default=None, description="What it is compared with, same unit.")  # type: ignore[assignment]


class ReportCase(CaseResult):
    """A case, with the digest of the scenario that it ran."""

    assertions: list[Assertion] = Field(default_factory=list)
    measurements: list[ReportMeasurement] = Field(default_factory=list)  # type: ignore[assignment]
    duration_s: Number = 0.0  # type: ignore[assignment]
    digest: str = Field(default="", description="Digest of the expanded scenario.")


class ReportRun(Strict):
    """What was run, when and with what."""

    run_id: str
    profile: str
    mode: Literal["profile", "selection"] = Field(description="'profile': all that the profile asks for was planned.")
    strict: bool
    command: str
    revision: str
    started: str
    ended: str | None = Field(description="None: the run was killed, or is still going on.")
    interrupted: bool
    exit_code: int
    resumed: list[ResumedLine]
    torn_bytes: int = Field(description="Length of a torn last line that was left out.")
    versions: dict[str, str]


class ReportVerdict(Strict):
    """The judgement of the run."""

    validated: bool
    sentence: str
    can_fine_tune: Answer
    answer: str = Field(description="The same in one sentence.")
    counts: dict[str, int] = Field(description="Cases by verdict, with 'missing' and 'total'.")


class Report(Strict):
    """A whole run."""

    schema_: Literal["sparkproof-report-1"] = Field(alias="schema")
    run: ReportRun
    verdict: ReportVerdict
    device: str = Field(description="The machine in a few words.")
    facts: dict[str, Any] = Field(description="Everything that was read of the machine; see its schema_version.")
    cases: list[ReportCase]
    missing: list[Planned] = Field(description="Planned cases without a result.")
    changed: list[str] = Field(description="Cases whose scenario was another one when the run was planned.")


def build(record: RunRecord) -> Report:
    """The report of a record."""
    header, verdict = record.header, record.verdict
    cases = [
        {**spell_non_finite(r.model_dump(mode="json")), "digest": record.entries[r.name].digest} for r in record.results
    ]
    return Report(
        schema="sparkproof-report-1",
        run=ReportRun(
            run_id=header.run_id,
            profile=header.profile.value,
            mode=header.mode,
            strict=header.strict,
            command=header.command,
            revision=header.revision,
            started=header.started,
            ended=record.end.ended if record.end else None,
            interrupted=record.interrupted,
            exit_code=record.exit_code,
            resumed=record.resumed,
            torn_bytes=record.torn_bytes,
            versions=header.versions,
        ),
        verdict=ReportVerdict(
            validated=verdict.validated,
            sentence=verdict.sentence,
            can_fine_tune=verdict.answer,
            answer=verdict.answer_sentence,
            counts=verdict.counts,
        ),
        device=record.facts.device_sentence(),
        facts=spell_non_finite(record.facts.model_dump(mode="json")),
        cases=[ReportCase.model_validate(c) for c in cases],
        missing=record.missing,
        changed=record.changed,
    )


def render(record: RunRecord) -> str:
    """`report.json` as text."""
    document = build(record).model_dump(mode="json", by_alias=True)
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `report.json`."""
    schema = Report.model_json_schema(mode="serialization", by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}


def report_schema() -> str:
    """The text of `reports/schema/report-1.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
