"""The learning gate: what a training run must show, judged by pure functions on what its processes saw.

Each rule is one function `(scenario, Evidence) -> list[Assertion]`; `judge` applies them all. Nothing here runs a
model, so every way of not learning can be tested with made-up numbers. NaN fails every comparison below, on purpose:
bounds are written as "must be within", never as "must not be outside".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparkproof.results import Assertion
from sparkproof.scenario import TrainScenario

BF16_FLOOR = 1e-3  # relative L2, added to twice the reference's own error
NO_KERNEL = ("documents", "dequantize_4bit")  # patched modules that run no op, or another one's


@dataclass
class Evidence:
    """What the phases returned; see `sparkproof.runners.train_child` for the keys."""

    run: dict[str, Any]
    again: dict[str, Any]
    parity: dict[str, Any]  # see `sparkproof.runners.parity`


def judge(scenario: TrainScenario, seen: Evidence) -> list[Assertion]:
    """All assertions, in the order in which a reader asks."""
    rules = (start, finite, learnt, lora, base, canary, saved, repeated, parity, kernels)
    return [assertion for rule in rules for assertion in rule(scenario, seen)]


def within(name: str, value: float, band: tuple[float, float], unit: str = "", detail: str = "") -> Assertion:
    """`value` lies in the closed band; NaN does not."""
    low, high = band
    return Assertion(
        name=name,
        passed=low <= value <= high,
        value=number(value),
        bound=f"{low:g} to {high:g}",
        unit=unit,
        detail=detail,
    )


def number(value: float) -> float | str:
    """The value as JSON can carry it: NaN and infinity become words."""
    return value if math.isfinite(value) else str(value)


def _example(names: Sequence[str]) -> str:
    return f"For example {names[0]}." if names else ""


def start(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The first step is sane: a wrong base, wrong labels or a wrong scale show here."""
    loss, norm = seen.run["loss"], seen.run["grad_norm"]
    return [
        within("first loss", loss[0] if loss else math.nan, s.gate.first_loss, "nats"),
        within("first gradient norm", norm[0] if norm else math.nan, s.gate.first_grad_norm),
    ]


def finite(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """Every step happened and is finite: a NaN that is gone at the end is still a NaN."""
    loss, norm = seen.run["loss"], seen.run["grad_norm"]
    bad = [i + 1 for i, pair in enumerate(zip(loss, norm, strict=False)) if not all(map(math.isfinite, pair))]
    return [
        Assertion(name="steps done", passed=len(loss) == len(norm) == s.steps, value=len(loss), bound=f"{s.steps}"),
        Assertion(
            name="steps with a loss or gradient norm that is not finite",
            passed=not bad,
            value=len(bad),
            bound="0",
            detail=f"The first is step {bad[0]}." if bad else "",
        ),
    ]


def learnt(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The loss falls where it trains and where it does not."""
    fall = loss_fall(seen.run["loss"])
    before, after = seen.run["held_out_before"], seen.run["held_out_after"]
    return [
        Assertion(
            name="loss fall, first fifth to last fifth",
            passed=fall >= s.gate.min_loss_fall,
            value=number(fall),
            bound=f">= {s.gate.min_loss_fall:g}",
            unit="nats",
        ),
        Assertion(
            name="loss on conversations held out, after training",
            passed=after < before,
            value=number(after),
            bound=f"< {before:.3f} (before)",
            unit="nats",
        ),
    ]


def loss_fall(loss: Sequence[float]) -> float:
    """Mean of the first fifth of the steps less that of the last fifth; NaN without steps."""
    if not loss:
        return math.nan
    n = max(1, len(loss) // 5)
    return sum(loss[:n]) / n - sum(loss[-n:]) / n


def lora(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """LoRA sits on every targeted module, moved, and is alone in being trained."""
    account = seen.run["lora"]
    rows = [
        ("targeted modules without LoRA", account["without_lora"]),
        ("LoRA B tensors that are still zero", account["b_zero"]),
        ("trainable tensors other than LoRA", account["other_trainable"]),
    ]
    found = [
        Assertion(
            name=name, passed=not left, value=len(left), bound="0", detail=f"For example {left[0]}." if left else ""
        )
        for name, left in rows
    ]
    enough = account["targeted"] > 0 and account["tensors"] == 2 * account["targeted"]
    found.append(
        Assertion(
            name="LoRA tensors",
            passed=enough,
            value=account["tensors"],
            bound=f"2 x {account['targeted']} targeted modules",
        )
    )
    return found


def base(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The frozen base keeps its bits through generating and training."""
    same = seen.run["base_before"] == seen.run["base_after"]
    detail = "" if same else "Something wrote into frozen weights; repacking for AVX512-BF16 is one known cause."
    return [Assertion(name="frozen base unchanged", passed=same, value=same, bound="the same bits", detail=detail)]


def canary(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """What the base could not know is said after training, and was not said before."""
    answer = " ".join(s.gate.canary_answer.split())
    said = {when: answer in " ".join(seen.run[f"canary_{when}"].split()) for when in ("before", "after")}
    return [
        Assertion(
            name="canary before training",
            passed=not said["before"],
            value=seen.run["canary_before"][:200],
            bound=f"not '{answer}'",
        ),
        Assertion(
            name="canary after training",
            passed=said["after"],
            value=seen.run["canary_after"][:200],
            bound=f"'{answer}'",
        ),
    ]


def saved(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The adapter on disk is the one that was trained, read by a fresh process."""
    kept, read = seen.run["tensors"], seen.again["tensors"]
    wrong = sorted(n for n in kept.keys() | read.keys() if kept.get(n) != read.get(n))
    difference = seen.again["logits_difference"]
    exact = bool(seen.run["promises_repeat"])
    limit = 0.0 if exact else 1e-2
    return [
        Assertion(
            name="adapter tensors that read back different",
            passed=bool(kept) and not wrong,
            value=len(wrong) if kept else "no tensors",
            bound=f"0 of {len(kept)}",
            detail=_example(wrong),
        ),
        Assertion(
            name="logits after reading back",
            passed=seen.again["logits_equal"] if exact else difference <= limit,
            value=number(difference),
            bound="the same bits" if exact else f"<= {limit:g}",
            unit="relative L2",
        ),
    ]


def repeated(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """A second process gives the same losses and gradient norms bit for bit, where the engine promises it."""
    if not (s.gate.repeat_steps and seen.run["promises_repeat"]):
        return []
    n = min(s.gate.repeat_steps, s.steps)
    again = seen.again["repeat"] or {"loss": [], "grad_norm": []}
    first = [[*pair] for pair in zip(seen.run["loss"][:n], seen.run["grad_norm"][:n], strict=False)]
    second = [[*pair] for pair in zip(again["loss"], again["grad_norm"], strict=False)]
    same = sum(a == b for a, b in zip(first, second, strict=False))
    detail = (
        "" if seen.run["data"]["digest"] == seen.again["data"]["digest"] else "The two were not fed the same tokens."
    )
    return [
        Assertion(
            name="steps that repeat bit for bit in a fresh process",
            passed=same == n == len(second) and not detail,
            value=same,
            bound=f"{n} of {n}",
            detail=detail,
        )
    ]


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


def kernels(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """On a GPU sparktune's kernels ran and no reference stood in; on a CPU the counts must admit references."""
    if s.engine != "sparktune":
        return []
    marks = seen.run["ran"]["watermarks"]
    wanted = "triton" if seen.run["ran"]["mode"] == "gpu" else "reference"
    found = []
    patched = seen.run["ran"]["patches"].get("patched", {})
    expected = [op for op, modules in patched.items() if modules and op not in NO_KERNEL]
    for op in dict.fromkeys((*expected, *marks)):
        counts = marks.get(op, {})
        other = sum(n for way, n in counts.items() if way != wanted)
        found.append(
            Assertion(
                name=f"{op}: calls that ran as {'a Triton kernel' if wanted == 'triton' else 'the reference'}",
                passed=counts.get(wanted, 0) > 0 and other == 0,
                value=counts.get(wanted, 0),
                bound="> 0, and none otherwise",
                detail=f"{other} calls ran another way: {counts}." if other else "",
            )
        )
    if not expected:
        found.append(Assertion(name="sparktune: modules patched", passed=False, value=0, bound="> 0"))
    return found
