"""Judging an export: pure functions from what the reference and the consumer answered.

Distributions are compared by KL(reference || exported) = sum_v p_ref(v) (log p_ref(v) - log p_exp(v)), in nats, over
the whole vocabulary at each position; the mean has a bound. Greedy text is not compared, since it flips where two
tokens are nearly tied; instead the first choice must agree wherever the reference leads by a clear margin. A lost
adapter hardly shows on texts that training did not touch, so the positions include the canary's answer, which only the
fine-tuned model predicts.

Numbers that are not finite fail every comparison.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparkproof.results import Assertion
from sparkproof.runners import export_file_judge
from sparkproof.runners.export_probe import CONVERSATIONS, HARD_STRINGS
from sparkproof.scenario import ExportScenario

SUM_TOLERANCE = 1e-3
SIXTEEN_BITS = ("bfloat16", "float16")  # as a consumer names the type that it computes in
ROUNDING = 1e-9  # KL is never negative, but for rounding


def judge(
    scenario: ExportScenario,
    reference: np.ndarray,
    exported: np.ndarray,
    questions: dict[str, Any],
    seen: dict[str, Any],
) -> list[Assertion]:
    """All assertions of one case; `seen` is what `consume` returned, with what the source's headers say.

    `exported` is empty where the file could not be read: then the file's own assertions are all there are.
    """
    found = export_file_judge.judge(scenario.format, seen)
    if seen.get("answers") is None:
        return found
    want, got = questions["answers"], seen["answers"]
    bound = scenario.kl_bound(seen.get("backend", {}).get("arithmetic") in SIXTEEN_BITS)
    return [
        *found,
        made_up(got["made_up"]),
        width(questions["vocabulary"], got["vocabulary"]),
        vocabulary(reference, exported),
        divergence(reference, exported, bound, scenario.reference),
        first_choice(reference, exported, scenario.margin),
        tokenizer(want["ids"], got["ids"]),
        template(want["template"], got["template"]),
        renders(want["renders"], got["renders"]),
        chats(want["chats"], got["chats"], seen.get("bos")),
        canary(got["canary"], seen["canary_answer"]),
        stops(want["stopped"], got["stopped"]),
    ]


def kl(reference: np.ndarray, exported: np.ndarray) -> np.ndarray:
    """KL(reference || exported) in nats of each row of log-probabilities, in fp64; NaN where a token is missing.

    Both are normalised first: how far a sum may be from 1 is `vocabulary`'s business, and llama.cpp's 3e-4 would hide
    divergences as small as those of f16.
    """
    p, q = normalised(reference), normalised(exported)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def normalised(rows: np.ndarray) -> np.ndarray:
    """Log-probabilities whose exponentials sum to 1, fp64."""
    values = rows.astype(np.float64)
    top = values.max(axis=-1, keepdims=True)
    return np.asarray(values - top - np.log(np.exp(values - top).sum(axis=-1, keepdims=True)))


def number(value: float) -> float | str:
    """The value as JSON can carry it: NaN and infinity become words."""
    return value if math.isfinite(value) else str(value)


def divergence(reference: np.ndarray, exported: np.ndarray, bound: float, name: str) -> Assertion:
    """The mean KL over positions is within the bound."""
    if reference.shape != exported.shape:
        return Assertion(
            name="mean KL", passed=False, detail=f"{exported.shape} answers to {reference.shape} questions came back."
        )
    values = kl(reference, exported)
    mean = float(values.mean()) if len(values) else float("nan")
    return Assertion(
        name=f"mean KL({name} || exported)",
        passed=-ROUNDING <= mean <= bound,
        value=number(mean),
        bound=f"<= {bound:g}",
        unit="nats",
        detail=f"{len(values)} positions; the largest is {values.max(initial=-math.inf):.3g}.",
    )


def first_choice(reference: np.ndarray, exported: np.ndarray, margin: float) -> Assertion:
    """The most likely token agrees wherever the reference leads by more than `margin` nats."""
    agree, clear = agreement(reference, exported, margin)
    return Assertion(
        name=f"top-1 agreement where the reference leads by {margin:g} nats",
        passed=clear > 0 and agree == clear,
        value=agree,
        bound=f"all of {clear}" if clear else "at least one clear position",
        unit="positions",
        detail="" if clear else "The reference is sure of nothing: this model or these prompts can't be judged so.",
    )


def agreement(reference: np.ndarray, exported: np.ndarray, margin: float) -> tuple[int, int]:
    """(positions that agree, positions where the reference is clear)."""
    top = np.sort(np.partition(reference, -2, axis=-1)[:, -2:], axis=-1)
    clear = (top[:, 1] - top[:, 0]) > margin
    filled = np.where(np.isnan(exported), -np.inf, exported)
    same = reference.argmax(axis=-1) == filled.argmax(axis=-1)
    return int((same & clear).sum()), int(clear.sum())


def made_up(names: list[str]) -> Assertion:
    """The consumer found every weight in the file."""
    return Assertion(
        name="weights that the consumer made up",
        passed=not names,
        value=len(names),
        bound="0",
        detail=", ".join(names[:3]),
    )


def width(want: int, got: int) -> Assertion:
    """The consumer has as many tokens as the reference: a padded vocabulary gives probability to tokens that are none."""
    return Assertion(name="tokens that the consumer knows", passed=want == got, value=got, bound=f"exactly {want}")


def vocabulary(reference: np.ndarray, exported: np.ndarray) -> Assertion:
    """Every token of the reference has a probability in the export, and they sum to 1."""
    missing = int(np.isnan(exported).any(axis=0).sum()) if exported.size else reference.shape[-1]
    total = np.exp(np.nan_to_num(exported.astype(np.float64), nan=-np.inf)).sum(axis=-1)
    off = float(np.abs(total - 1).max(initial=0))
    return Assertion(
        name="tokens of the vocabulary without a probability",
        passed=missing == 0 and off <= SUM_TOLERANCE,
        value=missing,
        bound="0",
        detail=f"Probabilities sum to 1 within {off:.1e} (allowed {SUM_TOLERANCE:g}).",
    )


def tokenizer(want: list[list[int]], got: list[list[int]]) -> Assertion:
    """Token ids are equal on every hard string."""
    wrong = [text for text, a, b in zip(HARD_STRINGS, want, got, strict=True) if a != b]
    return Assertion(
        name="hard strings tokenised otherwise",
        passed=bool(want) and not wrong,
        value=len(wrong),
        bound=f"0 of {len(want)}",
        detail=f"For example {wrong[0]!r}." if wrong else "",
    )


def template(want: str, got: str) -> Assertion:
    """The chat template is the same, byte for byte."""
    return Assertion(
        name="chat template",
        passed=bool(want) and want == got,
        value="equal" if want == got else "different",
        bound="equal, byte for byte",
        detail="" if want else "The reference has no chat template: a chat can't be compared.",
    )


def renders(want: list[str], got: list[str]) -> Assertion:
    """Conversations render to the same text."""
    wrong = [i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b]
    return Assertion(
        name="conversations rendered otherwise",
        passed=len(want) == len(CONVERSATIONS) and not wrong,
        value=len(wrong),
        bound=f"0 of {len(CONVERSATIONS)}",
        detail=f"Expected {want[wrong[0]][:120]!r}, got {got[wrong[0]][:120]!r}." if wrong else "",
    )


def chats(want: list[list[int]], got: list[list[int]], bos: int | None) -> Assertion:
    """The consumer feeds the same ids for a conversation; a second beginning of text is named."""
    wrong = [i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b]
    doubled = [i for i in wrong if bos is not None and beginnings(got[i], bos) > beginnings(want[i], bos)]
    said = f"Conversation {wrong[0] + 1} begins {got[wrong[0]][:4]}, not {want[wrong[0]][:4]}." if wrong else ""
    return Assertion(
        name="conversations fed as other tokens",
        passed=len(want) == len(CONVERSATIONS) and not wrong,
        value=len(wrong),
        bound=f"0 of {len(CONVERSATIONS)}",
        detail=f"{len(doubled)} begin with {bos}, the beginning of text, once too often. {said}" if doubled else said,
    )


def beginnings(ids: list[int], bos: int) -> int:
    """How many of the first ids are the beginning of text."""
    return next((n for n, i in enumerate(ids) if i != bos), len(ids))


def stops(want: bool, got: bool) -> Assertion:
    """Generation ends at a stop token, as the reference's does."""
    return Assertion(
        name="generation ends at a stop token",
        passed=want and got,
        value=got,
        bound="true",
        detail=""
        if want
        else "The reference did not stop either: the fine-tune taught no end, so this can't be judged.",
    )


def canary(text: str, answer: str) -> Assertion:
    """What only the fine-tuned model knows is said by the consumer."""
    said = " ".join(answer.split()) in " ".join(text.split())
    return Assertion(
        name="canary answer from the consumer",
        passed=bool(answer.split()) and said,
        value=text[:200],
        bound=f"contains '{answer}'",
    )
