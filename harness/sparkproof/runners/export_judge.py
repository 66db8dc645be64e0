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
from sparkproof.runners.export_probe import CONVERSATIONS, HARD_STRINGS
from sparkproof.scenario import ExportScenario

Q8_BLOCK = 32
SUM_TOLERANCE = 1e-3
ROUNDING = 1e-9  # KL is never negative, but for rounding
BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5}  # Q8_0: 34 bytes for 32 weights
OVERHEAD = 32 << 20  # vocabulary, merges and headers


def judge(
    scenario: ExportScenario,
    reference: np.ndarray,
    exported: np.ndarray,
    questions: dict[str, Any],
    seen: dict[str, Any],
) -> list[Assertion]:
    """All assertions of one case; `seen` is what `consume` returned, with `expected_parameters`."""
    want, got = questions["answers"], seen["answers"]
    return [
        types(scenario.format, seen["file"]["tensors"], seen["expected_type"]),
        parameters(seen["file"]["parameters"], seen["expected_parameters"]),
        size(seen["file"]),
        vocabulary(reference, exported),
        divergence(reference, exported, scenario.max_kl, scenario.reference),
        first_choice(reference, exported, scenario.clear_margin),
        tokenizer(want["ids"], got["ids"]),
        template(want["template"], got["template"]),
        renders(want["renders"], got["renders"]),
        canary(got["canary"], seen["canary_answer"]),
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


def types(format_: str, tensors: dict[str, dict[str, Any]], sixteen: str = "BF16") -> Assertion:
    """Each tensor has the type that the format promises."""
    wanted = {name: expected_type(format_, name, t, sixteen) for name, t in tensors.items()}
    wrong = [f"{n} is {t['type']}, not {wanted[n]}" for n, t in tensors.items() if t["type"] != wanted[n]]
    counts: dict[str, int] = {}
    for t in tensors.values():
        counts[t["type"]] = counts.get(t["type"], 0) + 1
    return Assertion(
        name="tensors of another type than the format's",
        passed=bool(tensors) and not wrong,
        value=len(wrong),
        bound="0",
        detail="; ".join(wrong[:2]) or ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "No tensors.",
    )


def expected_type(format_: str, name: str, tensor: dict[str, Any], sixteen: str) -> str:
    """The type of one tensor.

    gguf_*: vectors F32; matrices F16, or Q8_0 (F16 where a row is no multiple of 32). merged_16bit: `sixteen`, the
    base's 16-bit type. adapter: LoRA matrices only, F32 or 16 bits.
    """
    kind, dims = tensor["type"], tensor["shape"]
    match format_:
        case "merged_16bit":
            return sixteen
        case "adapter":
            lora = ".lora_A." in name or ".lora_B." in name
            return kind if lora and kind in ("F32", "BF16", "F16") else "LoRA in F32, BF16 or F16"
    if len(dims) < 2:
        return "F32"
    return "Q8_0" if format_ == "gguf_q8_0" and dims[-1] % Q8_BLOCK == 0 else "F16"


def parameters(found: int, expected: int) -> Assertion:
    """The file holds as many parameters as what it was made from."""
    return Assertion(
        name="parameters in the file", passed=found == expected > 0, value=found, bound=f"exactly {expected}"
    )


def size(file: dict[str, Any]) -> Assertion:
    """The file is as large as its tensors need, and not much larger."""
    need = sum(math.prod(t["shape"]) * BITS.get(t["type"], 0) / 8 for t in file["tensors"].values())
    return Assertion(
        name="file size",
        passed=0 < need <= file["bytes"] <= 1.05 * need + OVERHEAD,
        value=round(file["bytes"] / 2**20, 2),
        bound=f"{need / 2**20:.2f} to {(1.05 * need + OVERHEAD) / 2**20:.2f}",
        unit="MiB",
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


def canary(text: str, answer: str) -> Assertion:
    """What only the fine-tuned model knows is said by the consumer."""
    said = " ".join(answer.split()) in " ".join(text.split())
    return Assertion(
        name="canary answer from the consumer",
        passed=bool(answer.split()) and said,
        value=text[:200],
        bound=f"contains '{answer}'",
    )
