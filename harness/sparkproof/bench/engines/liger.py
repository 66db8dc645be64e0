"""Liger-Kernel's functions, called as its patched transformers models call them.

Where it patches only part of what a row measures, the rest is hf's: PEFT's layers around its SwiGLU, its norm and its
RoPE one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkproof.bench.cases import Call, Case

_LORA = "Liger has no LoRA kernels: its models run PEFT's layers, which are measured as hf"
MISSING = {
    "dequantize_4bit": "Liger has no 4-bit kernels",
    "lora_linear": _LORA,
    "lora_qkv": _LORA,
    "adamw8bit": "Liger has no optimiser",
}
# Its norm and activation write gradients over what they were given, its RoPE turns q and k where they lie, and its
# losses leave the gradient where the logits were.
WRITES = frozenset({"rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu", "cross_entropy", "lora_mlp"})


def refusal() -> str:
    """Why its kernels can't run here, or ""."""
    return "" if torch.cuda.is_available() else "Liger-Kernel needs a GPU"


def _norm_settings(case: Case) -> tuple[float, float, str, bool]:
    gemma = case.model.norm == "gemma"
    return case.model.eps, 1.0 if gemma else 0.0, "gemma" if gemma else "llama", not gemma


def _rms_norm(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_rms_norm

    w, settings = case.shared["weight"], _norm_settings(case)
    return lambda t: (liger_rms_norm(t["x"], w, *settings),)


def _add_rms_norm(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    w, settings = case.shared["weight"], _norm_settings(case)
    return lambda t: tuple(liger_fused_add_rms_norm(t["x"], t["residual"], w, *settings))


def _rope(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_rope

    cos, sin = case.shared["cos_doubled"], case.shared["sin_doubled"]

    def call(t: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k = liger_rope(t["q"].transpose(1, 2), t["k"].transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def _qk_norm_rope(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_rms_norm

    wq, wk, settings = case.shared["q_weight"], case.shared["k_weight"], _norm_settings(case)
    turn = _rope(case)
    return lambda t: turn({"q": liger_rms_norm(t["q"], wq, *settings), "k": liger_rms_norm(t["k"], wk, *settings)})


def _swiglu(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_swiglu

    return lambda t: (liger_swiglu(t["gate"], t["up"]),)


def _geglu(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_geglu

    return lambda t: (liger_geglu(t["gate"], t["up"]),)


def _cross_entropy(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda t: (liger_cross_entropy(t["logits"], t["labels"]),)


def _linear_cross_entropy(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    weight = case.shared["weight"]
    return lambda t: (liger_fused_linear_cross_entropy(t["hidden"], weight, t["labels"]),)


def _lora_mlp(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    m, act = case.shared["module"], liger_swiglu if case.model.activation == "silu" else liger_geglu
    return lambda t: (m.down_proj(act(m.gate_proj(t["x"]), m.up_proj(t["x"]))),)


BUILDERS: dict[str, Callable[[Case], Call]] = {
    "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "rope": _rope, "qk_norm_rope": _qk_norm_rope,
    "swiglu": _swiglu, "geglu": _geglu, "cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy,
    "lora_mlp": _lora_mlp,
}  # fmt: skip
