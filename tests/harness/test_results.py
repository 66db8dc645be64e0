"""Verdicts follow from assertions, and exit codes from verdicts."""

from __future__ import annotations

import pytest
from sparkproof.results import Assertion, CaseResult, Verdict, exit_code

P, F, B, S, R = Verdict.PASSED, Verdict.FAILED, Verdict.BROKEN, Verdict.SKIPPED, Verdict.RETEST


def test_a_case_that_asserts_nothing_is_broken() -> None:
    assert CaseResult.decide([])[0] is B


def test_one_miss_fails_and_is_named_with_value_and_bound() -> None:
    verdict, reason = CaseResult.decide(
        [
            Assertion(name="a", passed=True),
            Assertion(name="loss fell", passed=False, value=0.01, bound=">= 0.5", unit="nats"),
        ]
    )
    assert verdict is F
    assert "loss fell: 0.01 nats, allowed >= 0.5" in reason


def test_speed_under_a_bad_canary_is_a_retest_and_never_hides_a_failure() -> None:
    slow = Assertion(name="bandwidth", passed=False, about="speed")
    wrong = Assertion(name="result", passed=False)
    assert CaseResult.decide([slow], speed_trusted=False)[0] is R
    assert CaseResult.decide([slow], speed_trusted=True)[0] is F
    assert CaseResult.decide([slow, wrong], speed_trusted=False)[0] is F
    assert CaseResult.decide([Assertion(name="ok", passed=True)], speed_trusted=False)[0] is P


@pytest.mark.parametrize(
    ("verdicts", "strict", "code"),
    [
        ([P], False, 0),
        ([P, S], False, 0),
        ([P, S], True, 1),
        ([P, F], False, 1),
        ([P, B], False, 2),
        ([F, B, R], False, 1),
        ([B, R], False, 2),
        ([P, R], False, 3),
        ([], False, 2),
    ],
)
def test_exit_codes(verdicts: list[Verdict], strict: bool, code: int) -> None:
    assert exit_code(verdicts, strict) == code
