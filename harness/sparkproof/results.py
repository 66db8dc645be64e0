"""What a case leaves behind: assertions, measurements, and the verdict that follows from them.

A verdict is never set by a runner's mood: `CaseResult.decide` derives it from the assertions, so a case that
asserts nothing cannot pass.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Verdict(StrEnum):
    """How one case ended. See `exit_code` for what a run makes of them."""

    PASSED = "passed"
    FAILED = "failed"
    BROKEN = "broken"
    SKIPPED = "skipped"
    RETEST = "retest"


class ReasonClass(StrEnum):
    """Why a case was skipped, in classes that a CI job can act on."""

    GPU = "no-gpu"
    COMPUTE_CAPABILITY = "compute-capability"
    UNIFIED_MEMORY = "no-unified-memory"
    ARCH = "arch"
    MEMORY = "memory"
    DISK = "disk"
    NETWORK = "no-network"
    CREDENTIALS = "no-credentials"
    CONTAINER = "no-container-engine"
    SOFTWARE = "not-installed"
    ENGINE = "no-engine"
    UPSTREAM = "upstream-case"
    PLATFORM = "platform"


class Strict(BaseModel):
    """Base of every model here: unknown keys are errors, not noise."""

    model_config = ConfigDict(extra="forbid")


class Assertion(Strict):
    """One thing that had to hold."""

    name: str = Field(description="What was asserted, in a few words.")
    passed: bool
    value: float | int | str | bool | None = Field(default=None, description="What was seen.")
    bound: str = Field(default="", description="What was allowed, for example '<= 2 x plain PyTorch (1.3e-3)'.")
    unit: str = ""
    detail: str = Field(default="", description="Evidence, one or two sentences.")
    about: Literal["device", "speed"] = Field(
        default="device",
        description="'device': a miss fails the case. 'speed': a miss under bad canaries or throttling is a retest.",
    )


class Measurement(Strict):
    """A number with everything needed to compare it: unit, direction, raw samples and how it was taken."""

    name: str
    value: float
    unit: str
    higher_is_better: bool | None = Field(default=None, description="None: neither, for information.")
    samples: list[float] = Field(default_factory=list, description="Raw samples, in the same unit, in order.")
    low: float | None = Field(default=None, description="Lower end of the 95% interval.")
    high: float | None = Field(default=None, description="Upper end of the 95% interval.")
    reference: float | None = Field(default=None, description="What it is compared with, same unit.")
    reference_name: str = ""
    noise: float = Field(
        default=0.0,
        ge=0,
        description="How far like runs lie apart, same unit: a comparison of runs calls no less a change.",
    )
    conditions: dict[str, Any] = Field(
        default_factory=dict, description="Clock (MHz), temperature (C), power (W), canaries, device, mode."
    )


class CaseResult(Strict):
    """Everything one case leaves in the record."""

    name: str
    kind: str
    verdict: Verdict
    reason_class: ReasonClass | None = None
    reason: str = Field(default="", description="One sentence: why it was not passed.")
    next_step: str = Field(default="", description="What to do about it, one sentence or a command.")
    assertions: list[Assertion] = Field(default_factory=list)
    measurements: list[Measurement] = Field(default_factory=list)
    notices: list[str] = Field(default_factory=list, description="What a reader must know: 'ran in the interpreter'.")
    evidence: dict[str, Any] = Field(default_factory=dict, description="Curves, tables and texts that views draw.")
    mode: str = Field(default="", description="What really ran: gpu, interpreter, ahead-of-time, reference, host.")
    output_tail: str = ""
    traceback: str = ""
    rerun: str = ""
    artifacts: dict[str, str] = Field(default_factory=dict, description="Name -> path relative to the run's folder.")
    started: str = ""
    duration_s: float = 0.0

    @staticmethod
    def decide(assertions: list[Assertion], speed_trusted: bool = True) -> tuple[Verdict, str]:
        """Verdict and reason for a case that ran to its end.

        No assertions is `broken`: a check that cannot fail proves nothing. A missed speed assertion is a `retest`
        when canaries or throttling say that speed can't be judged.
        """
        if not assertions:
            return Verdict.BROKEN, "The case asserted nothing."
        hard = [a for a in assertions if not a.passed and (a.about == "device" or speed_trusted)]
        if hard:
            more = f" (and {len(hard) - 1} more)" if len(hard) > 1 else ""
            a = hard[0]
            seen = "" if a.value is None else f": {a.value}{' ' + a.unit if a.unit else ''}"
            return (
                Verdict.FAILED,
                f"{a.name}{seen}{', allowed ' + a.bound if a.bound else ''}{more}. {a.detail}".strip(),
            )
        unsteady = [a for a in assertions if not a.passed]
        if unsteady:
            a = next((a for a in unsteady if a.detail), unsteady[0])
            return Verdict.RETEST, f"Speed can't be judged: {a.detail or a.name}".rstrip(".") + "."
        return Verdict.PASSED, ""


def exit_code(verdicts: list[Verdict], strict: bool = False) -> int:
    """The run's exit code: a definite failure (1) outweighs a harness fault (2), which outweighs a retest (3)."""
    if Verdict.FAILED in verdicts or (strict and Verdict.SKIPPED in verdicts):
        return 1
    if Verdict.BROKEN in verdicts or not verdicts:
        return 2
    return 3 if Verdict.RETEST in verdicts else 0
