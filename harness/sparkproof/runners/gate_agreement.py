"""The rules of the gate that compare one step with another that must give the same.

With the reference engine; with the loss of the engine's own logits; the same rows padded, packed and accumulated; the model
with its adapter and the model with the adapter merged.
"""

from __future__ import annotations

from typing import Any

from sparkproof.results import Assertion
from sparkproof.runners.gate_evidence import Evidence, number
from sparkproof.scenario import TrainScenario

BF16_FLOOR = 1e-3  # relative L2, added to twice the reference's own error
OWN_LOSS_FP32 = 1e-3  # nats; what is left is the order of sums
MERGED_SHARE = {"fp32": 0.02, "bf16": 0.2}  # of how far the adapter moves the logits; rounding moves them by less


def parity(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """Loss and every LoRA gradient of the first step agree with the reference, all of them being non-zero.

    In fp32 the two must be close. Where training computes in bf16 its rounding moves gradients by several percent (8%
    in SmolLM2-135M), so there both are measured against the fp32 reference: the engine may be at most twice as far
    from it as the reference is in bf16, plus a tiny floor. The loss is compared token by token there: over the 50 or so
    labels of one batch bf16's logits move the mean by chance (0.005 nats for one engine and 0.030 for another whose gradients
    lay equally close, on an H100), while the root mean square over tokens is stable, and never less than the mean's.
    """
    found: list[Assertion] = []
    name, close, rounded = seen.parity["reference"], seen.parity["fp32"], seen.parity["bf16"]
    if close:
        found.append(
            Assertion(
                name=f"first loss, distance from {name}, fp32",
                passed=abs(close["loss"] - close["reference_loss"]) <= s.gate.parity_loss,
                value=number(abs(close["loss"] - close["reference_loss"])),
                bound=f"<= {s.gate.parity_loss:g}",
                unit="nats",
            )
        )
        found += _agree(seen, close, f"{name}, fp32", s.gate.parity_grad, f"<= {s.gate.parity_grad:g}")
    if rounded:
        own = rounded["reference_relative"]
        limit = max(s.gate.parity_grad, 2 * own + BF16_FLOOR)
        own_tokens = rounded["reference_token_rms"]
        most = max(s.gate.parity_loss, 2 * own_tokens)
        found.append(
            Assertion(
                name=f"first losses token by token, distance from {name}, bf16",
                passed=rounded["token_rms"] <= most,
                value=number(rounded["token_rms"]),
                bound=f"<= {most:.3g}, twice the reference's own {own_tokens:.3g}",
                unit="nats, root mean square",
            )
        )
        found += _agree(seen, rounded, f"{name}, bf16", limit, f"<= {limit:.3g}, twice the reference's own {own:.3g}")
    if not found:
        found.append(Assertion(name=f"gradients compared with {name}", passed=False, value=0, bound="1 at least"))
    return found


def _agree(seen: Evidence, p: dict[str, Any], where: str, limit: float, bound: str) -> list[Assertion]:
    expected = seen.run["lora"]["tensors"]
    zero, differ = p["zero"], p["names_differ"]
    return [
        Assertion(
            name=f"LoRA gradients, distance from {where}",
            passed=p["relative"] <= limit and not differ,
            value=number(p["relative"]),
            bound=bound,
            unit="relative L2",
            detail=f"Not in both: {differ[0]}." if differ else f"The worst tensor is {p['worst']}.",
        ),
        Assertion(
            name=f"LoRA gradients compared with {where}",
            passed=p["tensors"] == expected > 0 and not zero,
            value=p["tensors"] - len(zero),
            bound=f"{expected}, none zero",
            detail=f"Zero: {zero[0]}." if zero else "",
        ),
    ]


def own_loss(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The loss that is differentiated is the mean cross entropy of the engine's own logits, each with the next token."""
    compute, step = seen.closest
    tokens = step["token_losses"]
    apart = abs(step["loss"] - sum(tokens) / len(tokens)) if tokens else float("nan")
    limit = OWN_LOSS_FP32 if compute == "fp32" else s.gate.parity_loss
    return [
        Assertion(
            name=f"first loss, distance from that of its own logits, {compute}",
            passed=apart <= limit, value=number(apart), bound=f"<= {limit:g}", unit="nats",
            detail="" if apart <= limit else "Labels shifted twice, or a mean over other tokens, are known causes.",
        )
    ]  # fmt: skip


def packed(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """Two conversations in one row, told apart by positions that start again, learn as in two rows.

    An engine that the scenario excuses, with its reason, is not held to it; the result then says so.
    """
    if s.engine in s.gate.no_packing:
        return []
    return _fed(s, seen, "packed", "rows packed into one", "A document that sees the one before it is a known cause.")


def accumulated(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """Rows one by one, each loss divided by the tokens of all, add up to the step over all."""
    cause = "A mean for each micro-batch, instead of over all their tokens, is a known cause."
    return _fed(s, seen, "accumulated", "rows accumulated one by one", cause)


def _fed(s: TrainScenario, seen: Evidence, way: str, words: str, cause: str) -> list[Assertion]:
    compute, step = seen.closest
    found = step["fed"][way]
    limit, most = s.gate.parity_grad, s.gate.parity_loss
    if compute == "bf16":  # the same freedom as parity's: twice what bf16 costs the reference
        limit = max(limit, 2 * seen.parity["bf16"]["reference_relative"] + BF16_FLOOR)
        most = max(most, 2 * seen.parity["bf16"]["reference_token_rms"])
    good = found["relative"] <= limit and found["loss"] <= most
    return [
        Assertion(
            name=f"LoRA gradients of {words}, distance from one batch, {compute}",
            passed=good, value=number(found["relative"]), bound=f"<= {limit:.3g}", unit="relative L2",
            detail=f"Their losses lie {found['loss']:.2g} nats apart, allowed {most:.2g}.{'' if good else ' ' + cause}",
        )
    ]  # fmt: skip


def merged(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The adapter merged into the base's weights, as exports do it, gives the logits of the base with its adapter."""
    compute, step = seen.closest
    apart, effect = step["merged"]["distance"], step["merged"]["effect"]
    limit = MERGED_SHARE[compute] * effect
    return [
        Assertion(
            name=f"merged model, distance from the base with its adapter, {compute}",
            passed=effect > 0 and apart <= limit, value=number(apart),
            bound=f"<= {limit:.2g}, {MERGED_SHARE[compute]:.0%} of how far the adapter moves the logits",
            unit="relative L2",
        )
    ]  # fmt: skip
