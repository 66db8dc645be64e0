"""The learning gate: what a training run must show, judged by pure functions on what its processes saw.

Each rule is one function `(scenario, Evidence) -> list[Assertion]`; `judge` applies them all. Nothing here runs a
model, so every way of not learning can be tested with made-up numbers. NaN fails every comparison below, on purpose:
bounds are written as "must be within", never as "must not be outside".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparkproof.results import Assertion
from sparkproof.runners.gate_agreement import accumulated, merged, own_loss, packed, parity
from sparkproof.runners.gate_evidence import Evidence, example, none_left, number, within
from sparkproof.runners.gate_kernels import kernels
from sparkproof.scenario import TrainScenario


def judge(scenario: TrainScenario, seen: Evidence) -> list[Assertion]:
    """All assertions, in the order in which a reader asks."""
    rules = (
        data, start, finite, learnt, lora, moved, base, canary, saved, merged, repeated, parity, own_loss, packed,
        accumulated, kernels,
    )  # fmt: skip
    return [assertion for rule in rules for assertion in rule(scenario, seen)]


def data(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """Every step has something to learn, and every label is the token at its own place (a model shifts by itself)."""
    fed = seen.run["data"]
    return [
        Assertion(
            name="labels that are not the token at their place", passed=fed["misplaced"] == 0, value=fed["misplaced"],
            bound="0", detail="A label shifted beforehand is shifted twice." if fed["misplaced"] else "",
        ),
        Assertion(
            name="fewest tokens to learn in a step", passed=fed["fewest_learnt"] >= 1, value=fed["fewest_learnt"],
            bound=">= 1", detail="" if fed["fewest_learnt"] else "All labels of a step are masked.",
        ),
    ]  # fmt: skip


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
    """LoRA sits on every targeted module, can be trained, moved, and is alone in being trained."""
    account = seen.run["lora"]
    enough = account["targeted"] > 0 and account["tensors"] == 2 * account["targeted"]
    return [
        none_left("targeted modules without LoRA", account["without_lora"]),
        none_left("LoRA tensors that are frozen", account["frozen"]),
        none_left("LoRA B tensors that are still zero", account["b_zero"]),
        none_left("trainable tensors other than LoRA", account["other_trainable"]),
        Assertion(
            name="LoRA tensors",
            passed=enough,
            value=account["tensors"],
            bound=f"2 x {account['targeted']} targeted modules",
        ),
    ]


def moved(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The optimiser changed every LoRA tensor, A as well as B."""
    before, after = seen.run["tensors_before"], seen.run["tensors"]
    return [none_left("LoRA tensors that no step changed", sorted(n for n in after if before.get(n) == after[n]))]


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
            detail=example(wrong),
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
