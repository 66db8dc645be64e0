"""Unsloth's kernels by their public functions, called as its patched models call them.

Importing it replaces parts of transformers, PEFT and bitsandbytes; hf.py keeps those first and puts them back after.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkproof.bench.cases import Call, Case, norm_like
from sparkproof.bench.engines import hf

MISSING = {"adamw8bit": "Unsloth uses bitsandbytes' optimiser, which is measured as hf"}
# Its norms write the gradient over the one they were given, its activations over what forward saved.
WRITES = frozenset({"rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu", "cross_entropy"})
replaced: list[str] = []  # what its import changed in the libraries that are measured as hf, put back since


def refusal() -> str:
    """Why it can't be imported here, or ""."""
    return "" if torch.cuda.is_available() else "Unsloth refuses to be imported without a GPU"


@functools.cache
def kernels() -> Any:
    """`unsloth.kernels`, imported once, with what that changed elsewhere put back."""
    for name in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_DISABLE_AUTO_UPDATES", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    hf.capture()
    try:
        import unsloth  # noqa: F401
        import unsloth.kernels as found
    finally:
        replaced.extend(hf.restore())
    return found


def _norm_of(case: Case, weight: Tensor) -> Callable[[Tensor], Tensor]:
    norm, gemma = norm_like(case, weight), case.model.norm == "gemma"
    fast = kernels().fast_rms_layernorm
    return lambda x: fast(norm, x, gemma=gemma, reuse_grad=True)


def _rms_norm(case: Case) -> Call:
    norm = _norm_of(case, case.shared["weight"])
    return lambda t: (norm(t["x"]),)


def _add_rms_norm(case: Case) -> Call:
    # Its fused addition is for inference; in training its layers add, then norm.
    norm = _norm_of(case, case.shared["weight"])

    def call(t: dict[str, Any]) -> tuple[Tensor, Tensor]:
        s = t["residual"] + t["x"]
        return norm(s), s

    return call


def _rope(case: Case) -> Call:
    fast = kernels().fast_rope_embedding
    cos, sin = case.shared["cos_doubled"][0], case.shared["sin_doubled"][0]

    def call(t: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k = fast(t["q"].transpose(1, 2), t["k"].transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def _qk_norm_rope(case: Case) -> Call:
    kernels()
    cos, sin = case.shared["cos_doubled"][0], case.shared["sin_doubled"][0]
    if case.model.norm == "gemma":  # its fused op has no (1 + weight); Gemma's layers norm, then turn
        q_norm, k_norm = (_norm_of(case, case.shared[f"{n}_weight"]) for n in ("q", "k"))
        turn = _rope(case)
        return lambda t: turn({"q": q_norm(t["q"]), "k": k_norm(t["k"])})
    from unsloth.kernels.qk_norm_rope import fast_qk_norm_rope

    norms = [norm_like(case, case.shared[f"{n}_weight"]) for n in ("q", "k")]

    def call(t: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k = fast_qk_norm_rope(*norms, t["q"], t["k"], cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def _glu(forward: str, backward: str) -> Callable[[Case], Call]:
    def builder(case: Case) -> Call:
        run, back = getattr(kernels(), forward), getattr(kernels(), backward)

        class Activation(torch.autograd.Function):
            """Its two kernels as one differentiable call; backward's overwrites gradient, gate and up."""

            @staticmethod
            def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
                ctx.save_for_backward(gate, up)
                y: Tensor = run(gate, up)
                return y

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> Any:
                flat = [x.view(-1, x.shape[-1]) for x in (dy, *ctx.saved_tensors)]  # forward's takes three dimensions
                _, d_up, d_gate = back(*flat)
                return d_gate.view(dy.shape), d_up.view(dy.shape)

        def call(t: dict[str, Any]) -> tuple[Tensor]:
            gate, up = (t[n].view(1, *t[n].shape) for n in ("gate", "up"))
            y: Tensor = Activation.apply(gate, up)
            return (y.view(t["gate"].shape),)

        return call

    return builder


def _cross_entropy(case: Case) -> Call:
    fast = kernels().fast_cross_entropy_loss
    return lambda t: (fast(t["logits"][None], t["labels"][None]),)


def _linear_cross_entropy(case: Case) -> Call:
    kernels()
    from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss

    weight = case.shared["weight"]
    fixed = {"trainer": None, "lm_head_weight": weight, "lm_head_bias": None, "shift_labels": False}
    return lambda t: (unsloth_fused_ce_loss(hidden_states=t["hidden"][None], labels=t["labels"][None], **fixed),)


def _dequantize_4bit(case: Case) -> Call:
    fast = kernels().fast_dequantize
    return lambda t: (fast(t["packed"], t["state"]),)


def _lora_linear(case: Case) -> Call:
    layer = getattr(case.shared["module"], f"{case.row.kind.part}_proj")
    fast, holder = kernels().apply_lora_o, types.SimpleNamespace(o_proj=layer)
    return lambda t: (fast(holder, t["x"]),)


def _lora_qkv(case: Case) -> Call:
    fast, module = kernels().apply_lora_qkv, case.shared["module"]
    return lambda t: tuple(fast(module, t["x"], inplace=False))  # in place, a repeat would read its own gradient as x


def _lora_mlp(case: Case) -> Call:
    module = case.shared["module"]
    if case.model.activation != "silu":
        geglu = kernels().apply_lora_mlp_geglu_approx
        return lambda t: (geglu(module, t["x"].clone()),)  # writes dX over x and has no switch for it
    fast = kernels().apply_lora_mlp_swiglu
    return lambda t: (fast(module, t["x"], inplace=False),)


BUILDERS: dict[str, Callable[[Case], Call]] = {
    "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "rope": _rope, "qk_norm_rope": _qk_norm_rope,
    "swiglu": _glu("swiglu_fg_kernel", "swiglu_DWf_DW_dfg_kernel"),
    "geglu": _glu("geglu_approx_forward_kernel", "geglu_approx_backward_kernel"),
    "cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy,
    "dequantize_4bit": _dequantize_4bit, "lora_linear": _lora_linear, "lora_qkv": _lora_qkv, "lora_mlp": _lora_mlp,
}  # fmt: skip
