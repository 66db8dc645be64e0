"""This project's ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparkproof.bench.cases import LR, Call, Case

WRITES: frozenset[str] = frozenset()
MISSING: dict[str, str] = {}


def refusal() -> str:
    """Always there."""
    return ""


def _rms_norm(case: Case) -> Call:
    from sparktune.ops.rms_norm import rms_norm

    w, eps, norm = case.shared["weight"], case.model.eps, case.model.norm
    return lambda t: (rms_norm(t["x"], w, eps, norm),)


def _add_rms_norm(case: Case) -> Call:
    from sparktune.ops.add_rms_norm import add_rms_norm

    w, eps, norm = case.shared["weight"], case.model.eps, case.model.norm
    return lambda t: add_rms_norm(t["x"], t["residual"], w, eps, norm)


def _rope(case: Case) -> Call:
    from sparktune.ops.rope import rope

    cos, sin = case.shared["cos"], case.shared["sin"]
    return lambda t: rope(t["q"], t["k"], cos, sin)


def _qk_norm_rope(case: Case) -> Call:
    from sparktune.ops.qk_norm_rope import qk_norm_rope

    s, eps, norm = case.shared, case.model.eps, case.model.norm
    weights, tables = (s["q_weight"], s["k_weight"]), (s["cos"], s["sin"])
    return lambda t: qk_norm_rope(t["q"], t["k"], *weights, *tables, eps=eps, variant=norm)


def _swiglu(case: Case) -> Call:
    from sparktune.ops.swiglu import swiglu

    return lambda t: (swiglu(t["gate"], t["up"]),)


def _geglu(case: Case) -> Call:
    from sparktune.ops.geglu import geglu

    return lambda t: (geglu(t["gate"], t["up"], "tanh"),)


def _cross_entropy(case: Case) -> Call:
    from sparktune.ops.cross_entropy import cross_entropy

    return lambda t: (cross_entropy(t["logits"], t["labels"]),)


def _linear_cross_entropy(case: Case) -> Call:
    from sparktune.ops.linear_cross_entropy import linear_cross_entropy

    weight = case.shared["weight"]

    def call(t: dict[str, Any]) -> tuple[torch.Tensor]:
        found: Any = linear_cross_entropy(t["hidden"], weight, t["labels"])
        return (found[0] if isinstance(found, tuple) else found,)  # the loss, then what each row's is

    return call


def _dequantize_4bit(case: Case) -> Call:
    from sparktune.ops.dequantize_4bit import Nested, dequantize_4bit

    def call(t: dict[str, Any]) -> tuple[torch.Tensor]:
        s = t["state"]
        nested = Nested(s.state2.absmax, s.state2.code, s.offset, s.state2.blocksize)
        return (dequantize_4bit(t["packed"], s.absmax, s.blocksize, s.shape, torch.bfloat16, nested, s.quant_type),)

    return call


def _lora_linear(case: Case) -> Call:
    from sparktune.ops.lora_linear import lora_linear
    from sparktune.ops.weights import Weight

    base, (a, b), scale = case.shared["module"].lora(case.row.kind.part)
    weight = Weight.of(base)
    return lambda t: (lora_linear(t["x"], weight, a, b, scale=scale),)


def _several(case: Case, names: tuple[str, str, str]) -> tuple[Any, Any, Any]:
    from sparktune.ops.weights import Weight

    parts = [case.shared["module"].lora(n) for n in names]
    return tuple(Weight.of(p[0]) for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts)


def _lora_qkv(case: Case) -> Call:
    from sparktune.ops.lora_qkv import lora_qkv

    weights, adapters, scales = _several(case, ("q", "k", "v"))
    return lambda t: lora_qkv(t["x"], weights, adapters, scales)


def _lora_mlp(case: Case) -> Call:
    from sparktune.ops.lora_mlp import lora_mlp

    weights, adapters, scales = _several(case, ("gate", "up", "down"))
    act = case.model.activation
    return lambda t: (lora_mlp(t["x"], weights, adapters, scales, activation=act),)


def _adamw8bit(case: Case) -> Call:
    from sparktune.optim import AdamW8bit

    params = case.shared["owned"]()
    optimizer = AdamW8bit(params, lr=LR)

    def call(t: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        optimizer.step()
        return tuple(p.detach() for p in params[:4])

    return call


BUILDERS: dict[str, Callable[[Case], Call]] = {
    "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "rope": _rope, "qk_norm_rope": _qk_norm_rope,
    "swiglu": _swiglu, "geglu": _geglu, "cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy,
    "dequantize_4bit": _dequantize_4bit, "lora_linear": _lora_linear, "lora_qkv": _lora_qkv, "lora_mlp": _lora_mlp,
    "adamw8bit": _adamw8bit,
}  # fmt: skip
