"""Differences that a scenario declares, with their reason and source: what a consumer is known not to do.

A declaration names one assertion and the very value it fails with, so anything worse, or anything else, fails as ever. The report
repeats each one that was met, and says of one that was not that it can go.
"""

from __future__ import annotations

from sparkproof.results import Assertion
from sparkproof.scenario import ExportScenario


def apply(assertions: list[Assertion], scenario: ExportScenario) -> tuple[list[Assertion], list[str]]:
    """(the assertions, with declared misses passed and marked; a sentence each for the reader)."""
    found, told = list(assertions), []
    for declared in scenario.expected:
        if scenario.family not in declared.families:
            continue
        for i, a in enumerate(found):
            if a.name != declared.assertion:
                continue
            if a.passed:
                told.append(f"The declared difference '{a.name}' is gone; its declaration can go too.")
            elif a.value == declared.value and declared.shows in a.detail:
                said = f"Declared: {declared.reason} ({declared.source})"
                found[i] = a.model_copy(update={"passed": True, "detail": f"{a.detail} {said}"})
                told.append(f"{a.name}: {a.value}, as declared: {declared.reason} ({declared.source})")
    return found, told
