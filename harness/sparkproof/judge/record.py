"""What the judge writes down: one `Check` for everything that had to hold, and what was not run with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One thing that had to hold for one result under one family."""

    what: str  # "error", "rounding order", "NaN and Inf", "inputs unchanged", ...
    of: str  # "out", "gradient of x", or "call"
    where: str  # "llama bf16, typical, sliced inputs"
    passed: bool
    value: float | None = None  # 1.0 is the most that is allowed, where there is a number
    detail: str = ""

    def sentence(self) -> str:
        """What failed or held, for a person."""
        return f"{self.of}, {self.what} ({self.where}): {self.detail or ('held' if self.passed else 'did not hold')}"


class Unsound(RuntimeError):
    """The case itself could prove nothing (a degenerate oracle, say): a fault of the harness, not of the op."""


class FirstFailure(Exception):
    """Ends a judgement that was asked to stop at its first failure."""


@dataclass
class Judgement:
    """All checks of one op."""

    op: str
    mode: str  # "gpu" or "interpreter"
    stop_at_first: bool = False
    checks: list[Check] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    where: str = ""
    error: BaseException | None = None  # the exception behind a failed "call"

    @property
    def failures(self) -> list[Check]:
        """Checks that did not hold."""
        return [c for c in self.checks if not c.passed]

    def check(self, what: str, of: str, passed: bool, value: float | None = None, detail: str = "") -> None:
        """Write down one check, at the present place."""
        self.checks.append(Check(what, of, self.where, bool(passed), value, detail))
        if self.stop_at_first and not passed:
            raise FirstFailure

    @contextmanager
    def tested(self, what: str) -> Iterator[None]:
        """Code of the op under test: an exception is a failed check, and ends this place's checks."""
        try:
            yield
        except FirstFailure:
            raise
        except Exception as e:
            self.error = e
            first = _first_cause(e)
            self.check("no exception", what, False, detail=f"{type(first).__name__}: {str(first).strip()[:300]}")
            raise Raised from e

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "op": self.op,
            "mode": self.mode,
            "checks": [asdict(c) for c in self.checks],
            "not_run": self.not_run,
        }


def _first_cause(e: BaseException) -> BaseException:
    """What an exception was raised from, and so on: Triton's interpreter wraps one anew at every call of a kernel's parts."""
    while e.__cause__ is not None:
        e = e.__cause__
    return e


class Raised(Exception):
    """The op under test raised; written down already."""
