"""sparktune's own ops. Each builder imports its op alone, so that one that does not load is one row's error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparkproof.bench.inputs import PROJECTIONS, Builder, Forward, Inputs
from sparkproof.bench.shapes import Case


def version() -> str:
    """The package's."""
    import sparktune

    return str(getattr(sparktune, "__version__", ""))


def _rms_norm(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.rms_norm import rms_norm

    return lambda: (rms_norm(t["x"], t["weight"], case.model.eps, case.model.norm),)


def _add_rms_norm(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.add_rms_norm import add_rms_norm

    return lambda: add_rms_norm(t["x"], t["residual"], t["weight"], case.model.eps, case.model.norm)


def _rope(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.rope import rope

    return lambda: rope(t["q"], t["k"], t["cos_half"], t["sin_half"])


def _qk_norm_rope(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.qk_norm_rope import qk_norm_rope  # type: ignore[import-not-found,unused-ignore]

    weights = t["q_weight"], t["k_weight"]
    tables = t["cos_half"], t["sin_half"]
    return lambda: qk_norm_rope(t["q"], t["k"], *weights, *tables, eps=case.model.eps, variant=case.model.norm)


def _swiglu(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.swiglu import swiglu

    return lambda: (swiglu(t["gate"], t["up"]),)


def _geglu(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.geglu import geglu

    return lambda: (geglu(t["gate"], t["up"], "tanh"),)


def _cross_entropy(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.cross_entropy import cross_entropy

    return lambda: (cross_entropy(t["logits"], t["labels"]),)


def _linear_cross_entropy(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.linear_cross_entropy import linear_cross_entropy

    return lambda: (linear_cross_entropy(t["x"], t["head"], t["labels"]),)


def _dequantize_4bit(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.weights import Weight

    weight = Weight.of(t["w"])
    return lambda: (weight.dequantize(torch.bfloat16),)


def _layers(case: Case, t: Inputs) -> tuple[tuple[Any, ...], tuple[tuple[Tensor, Tensor], ...]]:
    from sparktune.ops.weights import Weight

    parts = PROJECTIONS.get(case.op, (case.part,))
    return tuple(Weight.of(t[p]) for p in parts), tuple((t[f"{p}_a"], t[f"{p}_b"]) for p in parts)


def _lora_linear(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.lora_linear import lora_linear

    (weight,), ((a, b),) = _layers(case, t)
    return lambda: (lora_linear(t["x"], weight, a, b),)


def _lora_qkv(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.lora_qkv import lora_qkv

    weights, adapters = _layers(case, t)
    return lambda: lora_qkv(t["x"], weights, adapters)  # type: ignore[arg-type]


def _lora_mlp(case: Case, t: Inputs) -> Forward:
    from sparktune.ops.lora_mlp import lora_mlp

    weights, adapters = _layers(case, t)
    return lambda: (lora_mlp(t["x"], weights, adapters, activation=case.model.activation),)  # type: ignore[arg-type]


def _adamw8bit(case: Case, t: Inputs) -> Forward:
    from sparktune.optim import AdamW8bit

    optimiser = AdamW8bit(t["params"], lr=1e-3, weight_decay=0.0)

    def step() -> tuple[Tensor, ...]:
        optimiser.step()
        return tuple(t["params"])

    return step


BUILDERS: dict[str, Builder] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "dequantize_4bit": _dequantize_4bit,
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
    "lora_mlp": _lora_mlp,
    "adamw8bit": _adamw8bit,
}
