"""A run as its record tells it: the lines of `record.jsonl` as models, and `RunRecord`, the source of every view."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.report.rundir import RECORD
from sparkproof.report.verdict import RunVerdict, judge
from sparkproof.results import CaseResult, Strict, Verdict, exit_code
from sparkproof.scenario import Profile

SCHEMA = "sparkproof-record-1"


class Planned(Strict):
    """A case that the run set out to do."""

    name: str
    kind: str
    file: str = ""
    digest: str = Field(default="", description="Digest of the expanded scenario.")


class Header(Strict):
    """The first line."""

    type: Literal["run"] = "run"
    schema_: Literal["sparkproof-record-1"] = Field(alias="schema")
    run_id: str
    started: str = Field(description="ISO 8601, UTC.")
    profile: Profile
    planned: list[Planned]
    facts: Facts
    versions: dict[str, str] = Field(default_factory=dict, description="What was installed, by distribution.")
    revision: str = Field(default="", description="Commit of the checkout, '+' behind it if files were changed.")
    command: str = ""
    strict: bool = False
    mode: Literal["profile", "selection"] = Field(
        default="selection", description="'profile': all that the profile asks for was planned, unaltered."
    )


class ResultLine(Strict):
    """A case that ended."""

    type: Literal["case"] = "case"
    result: CaseResult
    digest: str = ""


class ResumedLine(Strict):
    """The run goes on after it had ended or was killed."""

    type: Literal["resumed"] = "resumed"
    at: str
    command: str = ""
    revision: str = ""
    lost_bytes: int = Field(default=0, description="Length of a torn last line that was cut off.")
    note: str = ""


class EndLine(Strict):
    """The run ended by itself or by Ctrl-C; a killed run has no such line."""

    type: Literal["end"] = "end"
    ended: str
    interrupted: bool = False
    exit_code: int


Line = Header | ResultLine | ResumedLine | EndLine
LINES: dict[str, type[Header] | type[ResultLine] | type[ResumedLine] | type[EndLine]] = {
    "run": Header,
    "case": ResultLine,
    "resumed": ResumedLine,
    "end": EndLine,
}


@dataclass
class RunRecord:
    """A run. Of a case with several results, after a resume, the latest counts."""

    run_dir: Path
    header: Header
    entries: dict[str, ResultLine] = field(default_factory=dict)
    resumed: list[ResumedLine] = field(default_factory=list)
    end: EndLine | None = None
    valid_bytes: int = 0
    torn_bytes: int = 0

    @property
    def run_id(self) -> str:
        """The run's name: that of its folder when it began."""
        return self.header.run_id

    @property
    def profile(self) -> Profile:
        """The profile that was asked for."""
        return self.header.profile

    @property
    def strict(self) -> bool:
        """Whether a skipped case fails the run."""
        return self.header.strict

    @property
    def facts(self) -> Facts:
        """The machine."""
        return self.header.facts

    @cached_property
    def results(self) -> list[CaseResult]:
        """The latest result of each case: planned ones in planned order, then any other (a broken scenario file)."""
        planned = [p.name for p in self.header.planned]
        order = [n for n in planned if n in self.entries] + [n for n in self.entries if n not in set(planned)]
        return [self.entries[n].result for n in order]

    @cached_property
    def missing(self) -> list[Planned]:
        """Planned cases without a result."""
        return [p for p in self.header.planned if p.name not in self.entries]

    @property
    def changed(self) -> list[str]:
        """Cases whose result belongs to another version of their scenario than was planned first."""
        first = {p.name: p.digest for p in self.header.planned}
        return [n for n, e in self.entries.items() if n in first and e.digest and e.digest != first[n]]

    @property
    def interrupted(self) -> bool:
        """Ctrl-C, a kill, or a run still going on: not ended by itself."""
        return self.end is None or self.end.interrupted

    @property
    def exit_code(self) -> int:
        """0, 1, 2, 3 by the verdicts; 130 after Ctrl-C; a run with cases left is never 0."""
        if self.end is not None and self.end.interrupted:
            return 130
        code = exit_code([r.verdict for r in self.results], self.strict)
        return 2 if self.missing and code in (0, 3) else code

    @cached_property
    def verdict(self) -> RunVerdict:
        """What the run says as a whole."""
        return judge(
            facts=self.facts,
            results=self.results,
            missing=[p.name for p in self.missing],
            profile=self.profile.value,
            whole_profile=self.header.mode == "profile",
            interrupted=self.interrupted,
            ended=self.end is not None,
        )

    @property
    def sentence(self) -> str:
        """The one sentence that matters."""
        return self.verdict.sentence

    @property
    def validated(self) -> bool:
        """Whether the target device passed all that the profile requires."""
        return self.verdict.validated

    def of(self, *verdicts: Verdict) -> list[CaseResult]:
        """Results with one of these verdicts."""
        return [r for r in self.results if r.verdict in verdicts]

    def to_run(self, digests: dict[str, str]) -> list[str]:
        """Planned cases that a resumed run must do: without a result, or whose scenario is another one by now.

        `digests` are those of today's scenarios; a case that is gone from them is left out.
        """
        return [
            p.name
            for p in self.header.planned
            if p.name in digests and (p.name not in self.entries or self.entries[p.name].digest != digests[p.name])
        ]


def load(run_dir: Path) -> RunRecord:
    """Read a run's record; a torn last line, as `kill -9` or a power cut leaves it, is left out and counted.

    Errors: UserError when there is no record, or when something other than the last line is not one.
    """
    path = run_dir / RECORD
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror}.", "`sparkproof validate` makes a run.") from None
    record: RunRecord | None = None
    offset = 0
    for number, raw in enumerate(data.splitlines(keepends=True), start=1):
        last = offset + len(raw) == len(data)
        line = _parse(raw)
        if not isinstance(line, Header | ResultLine | ResumedLine | EndLine):
            if last and record is not None:
                break  # torn
            other = _other_schema(raw) if number == 1 else ""
            if other:
                raise UserError(f"{path} was written by another version ({other}).", f"This one reads {SCHEMA}.")
            raise UserError(f"{path} is not the record of a run: line {number} is {line}.", "Start a new run.")
        if record is None:
            if not isinstance(line, Header):
                raise UserError(f"{path} is not the record of a run: it does not begin with one.", "Start a new run.")
            record = RunRecord(run_dir, line)
        elif isinstance(line, Header):
            raise UserError(f"{path} holds two runs: line {number} begins another.", "Start a new run.")
        elif isinstance(line, ResultLine):
            record.entries[line.result.name] = line
        elif isinstance(line, ResumedLine):
            record.resumed.append(line)
            record.end = None
        else:
            record.end = line
        offset += len(raw)
    if record is None:
        raise UserError(f"{path} is empty: the run ended before it began.", "Start a new run.")
    record.valid_bytes, record.torn_bytes = offset, len(data) - offset
    return record


def _parse(raw: bytes) -> Line | str:
    """A line as its model, or what is wrong with it in a few words. Only a whole line, newline included, counts."""
    if not raw.endswith(b"\n"):
        return "cut off"
    try:
        document = json.loads(raw)
        return LINES[document["type"]].model_validate(document)
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, ValidationError):
            first = e.errors()[0]
            return f"not valid ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        return "not a line of a record"


def _other_schema(raw: bytes) -> str:
    try:
        schema: Any = json.loads(raw).get("schema", "")
    except (ValueError, AttributeError):
        return ""
    return str(schema) if schema and schema != SCHEMA else ""
