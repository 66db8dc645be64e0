"""What a check says: an `Outcome`, which holds findings only where something is worth telling.

A check that was quiet, one that does not apply and one that lacked facts are three different things, and no view may
take one for another.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from sparkproof.results import ReasonClass, Strict


class Severity(StrEnum):
    """How bad a finding is. `error`: fine-tuning fails or lies; `warning`: it may; `info`: harmless, explained."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


class Finding(Strict):
    """One known failure, seen on these facts."""

    check: str = Field(description="Id of the check, such as 'triton.ptxas'.")
    rows: list[int] = Field(description="Rows of the failure list that it covers.")
    severity: Severity
    title: str
    evidence: str = Field(description="What was seen, with the values.")
    cause: str
    fix: str = Field(description="A command to copy where one exists; empty when there is nothing to do.")
    source: str = Field(description="Public threads and pages that report it.")


class Outcome(Strict):
    """How one check went on these facts."""

    check: str
    topic: str
    title: str
    state: Literal["ok", "found", "not applicable", "not read"]
    seen: str = Field(description="What was looked at and seen, or why the check says nothing.")
    lacks: ReasonClass = Field(default=ReasonClass.PLATFORM, description="What this machine lacks, if not applicable.")
    findings: list[Finding] = Field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether the check reached a conclusion."""
        return self.state in ("ok", "found")

    @property
    def worst(self) -> Finding | None:
        """The gravest finding."""
        return min(self.findings, key=lambda f: f.severity.rank, default=None)
