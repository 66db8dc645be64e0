"""Parting what a format loses from what is wrong: a quantised file's consumer against transformers over the file's own weights.

    16-bit model  --what the format loses-->  the file's weights in transformers  --arithmetic of the consumer-->  its answers

The second step has a tight bound: that llama.cpp rounds inputs to 8 bits where it multiplies by quantised weights is the format's
share, and transformers does so too (`export_inputs`). What is left is where in attention it rounds, and keys and values in fp16.
The first has the format's own, wide one, and is the model's affair: some models don't survive four bits. Where an assertion about
the whole way misses, its detail says which step lost it; the format is named only if everything about the second step held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparkproof.results import Assertion, Measurement
from sparkproof.runners import export_judge
from sparkproof.scenario import ExportScenario

WHOLE_WAY = (
    "mean KL(base",
    "top-1",
    "canary answer",
    "generation ends",
)  # how the names begin that the format may miss

FORMAT_LOST = "lost it, not the export"  # what a detail says, and a declared difference may name


@dataclass(frozen=True)
class Rounded:
    """What transformers said over the file's own weights."""

    rows: np.ndarray  # log-probabilities, as the consumer's
    answers: dict[str, Any]
    strays: list[str]  # tensors of the file that are no rounding of the model's
    missing: list[str]  # tensors of the model that the file lacks
    inputs: int = 0  # weights whose products had their inputs rounded to 8 bits


def judge(scenario: ExportScenario, own: Rounded, exported: np.ndarray, seen: dict[str, Any]) -> list[Assertion]:
    """The file holds the model's weights, rounded, and the consumer makes of them what transformers does."""
    return [
        held(own),
        export_judge.divergence(own.rows, exported, scenario.max_kl_file, "the file's weights in transformers"),
        same_answer(own.answers["canary"], seen["answers"]["canary"], seen["canary_answer"]),
    ]


def held(own: Rounded) -> Assertion:
    """Every tensor is there, and within its type's rounding of what it should be."""
    wrong = [*own.strays, *(f"{name} is not in the file" for name in own.missing)]
    return Assertion(
        name="tensors of the file that are no rounding of the model's", passed=not wrong, value=len(wrong), bound="0",
        detail="; ".join(wrong[:3]),
    )  # fmt: skip


def same_answer(own: str, got: str, answer: str) -> Assertion:
    """Both say the answer, or neither does: a text that is lost goes its own way at the first near tie, and its KL judges it."""
    said = [export_judge.canary(text, answer).passed for text in (own, got)]
    return Assertion(
        name="canary answer as the file's weights give it",
        passed=said[0] == said[1] and bool(got.strip()),
        value=got[:200],
        bound=f"contains '{answer}'" if said[0] else f"lost as in '{own[:80]}'",
    )


def explained(
    assertions: list[Assertion], tight: list[Assertion], scenario: ExportScenario, reference: np.ndarray, own: Rounded,
    exported: np.ndarray, questions: dict[str, Any],
) -> list[Assertion]:  # fmt: skip
    """`assertions` about the whole way; one that missed says what lost it, with the KL of each step."""
    if reference.shape != exported.shape:
        return assertions
    kls = [float(export_judge.kl(a, b).mean()) for a, b in steps(reference, own, exported)]
    figures = (
        f"transformers over the file's own weights is {kls[0]:.3g} nats from {scenario.reference}, {scenario.consumer} "
        f"{kls[2]:.3g}, and {kls[1]:.3g} from those weights"
    )
    said = export_judge.canary(own.answers["canary"], questions["canary_answer"])
    ended = export_judge.stops(questions["answers"]["stopped"], own.answers["stopped"])
    by_file = {
        a.name: a.passed
        for a in (
            export_judge.divergence(reference, own.rows, scenario.kl_bound(), scenario.reference),
            export_judge.first_choice(reference, own.rows, scenario.margin),
            said,
        )
    }
    by_file[ended.name] = ended.passed and said.passed  # a text that lost its answer ends where chance has it
    found = []
    for a in assertions:
        if not a.passed and a.name.startswith(WHOLE_WAY):
            if by_file[a.name] or not all(t.passed for t in tight):
                why = f"The format alone does not explain it: {figures}."
            else:
                why = f"{scenario.format} {FORMAT_LOST}: {figures}."
            a = a.model_copy(update={"detail": f"{a.detail} {why}".strip()})
        found.append(a)
    return found


def steps(reference: np.ndarray, own: Rounded, exported: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the format loses, what the consumer adds, and both."""
    return [(reference, own.rows), (own.rows, exported), (reference, exported)]


def measurements(
    scenario: ExportScenario, reference: np.ndarray, own: Rounded, exported: np.ndarray
) -> list[Measurement]:
    """Mean KL of the two steps."""
    if reference.shape != exported.shape:
        return []
    names = ("KL that the format loses, mean", "KL that the consumer adds, mean")
    where = {"consumer": scenario.consumer, "reference": scenario.reference}
    values = [export_judge.kl(a, b) for a, b in steps(reference, own, exported)[:2]]
    return [
        Measurement(
            name=name, value=float(v.mean()), unit="nats", higher_is_better=False, samples=[float(x) for x in v],
            conditions=where,
        )
        for name, v in zip(names, values, strict=True) if np.isfinite(v).all()
    ]  # fmt: skip


def evidence(own: Rounded) -> dict[str, Any]:
    """What the record keeps."""
    return {
        "canary": own.answers["canary"], "no rounding": own.strays, "missing": own.missing,
        "weights whose inputs were rounded to 8 bits": own.inputs,
    }  # fmt: skip
