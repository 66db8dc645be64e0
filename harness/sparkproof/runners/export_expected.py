"""Differences that a scenario declares, with their reason and source: what a consumer is known not to do.

A declaration names one assertion and the very value it fails with, or words of its evidence that nothing else gives, so anything
worse, or anything else, fails as ever. The report repeats each one that was met, and says of one that was not that it can go.
"""

from __future__ import annotations

from sparkproof.results import Assertion
from sparkproof.scenario import ExportScenario


def apply(assertions: list[Assertion], scenario: ExportScenario) -> tuple[list[Assertion], list[str]]:
    """(the assertions, with declared misses passed and marked; a sentence each for the reader)."""
    found, told = list(assertions), []
    for declared in scenario.expected:
        if scenario.family not in declared.families or scenario.format not in (declared.formats or [scenario.format]):
            continue
        where = f" ({declared.source})" if declared.source else ""
        for i, a in enumerate(found):
            if a.name != declared.assertion:
                continue
            if a.passed:
                told.append(f"The declared difference '{a.name}' is gone; its declaration can go too.")
            elif declared.value in (None, a.value) and declared.shows in a.detail:
                said = f"Declared: {declared.reason}{where}"
                found[i] = a.model_copy(update={"passed": True, "detail": f"{a.detail} {said}"})
                told.append(f"{a.name}: {a.value}, as declared: {declared.reason}{where}")
    return found, told
