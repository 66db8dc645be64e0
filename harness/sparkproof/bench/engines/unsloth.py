"""Unsloth's own ops, by their public functions, with what its import changes elsewhere put back.

`import unsloth` replaces functions of transformers, PEFT, bitsandbytes and PyTorch and sets options of the compiler. The
other engines stand in the same process, so these are noted before and restored after; NOTES names what had changed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from importlib import metadata, util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparkproof.bench.inputs import PROJECTIONS, Builder, Forward, Inputs
from sparkproof.bench.shapes import Case

WATCHED = (
    ("bitsandbytes", "matmul_4bit"),
    ("bitsandbytes.functional", "dequantize_4bit"),
    ("bitsandbytes.nn.Linear4bit", "forward"),
    ("peft.tuners.lora.bnb.Linear4bit", "forward"),
    ("torch.nn.functional", "cross_entropy"),
    ("torch.nn.functional", "linear"),
    ("torch.nn.functional", "silu"),
    ("torch.nn.functional", "gelu"),
    ("torch", "compile"),
    ("transformers.models.llama.modeling_llama", "apply_rotary_pos_emb"),
)


def version() -> str:
    """The package's."""
    return metadata.version("unsloth")


def _owner(path: str) -> Any:
    module, _, rest = path, "", ""
    if path.rpartition(".")[2][:1].isupper():
        module, _, rest = path.rpartition(".")
    owner = importlib.import_module(module)
    return getattr(owner, rest) if rest else owner


def _import() -> tuple[str, ...]:
    """Import Unsloth and undo what it did to others; returns what that was."""
    if util.find_spec("unsloth") is None:
        raise ImportError("the package unsloth is not installed")
    if not torch.cuda.is_available():
        raise ImportError("unsloth can only be imported where there is a GPU")
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    before = []
    for path, name in WATCHED:
        with contextlib.suppress(ImportError, AttributeError):
            owner = _owner(path)
            before.append((owner, path, name, getattr(owner, name)))
    options = [(c, c.get_config_copy()) for c in (dynamo, inductor)]
    precision = torch.get_float32_matmul_precision()
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    importlib.import_module("unsloth")
    changed = []
    for owner, path, name, value in before:
        if getattr(owner, name) is not value:
            setattr(owner, name, value)
            changed.append(f"{path}.{name}")
    for config, was in options:
        for key, value in was.items():
            with contextlib.suppress(Exception):
                if getattr(config, key) != value:
                    setattr(config, key, value)
                    changed.append(f"{config.__name__}.{key}")
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)
        changed.append("the precision of fp32 products")
    return tuple(changed)


CHANGED = _import()
K: Any = importlib.import_module("unsloth.kernels")
LORA: Any = importlib.import_module("unsloth.kernels.fast_lora")
NOTES = (f"Importing Unsloth changed these, which were put back: {', '.join(CHANGED) or 'none of those watched'}.",)


def _like_norm(case: Case, weight: Tensor) -> Any:
    return SimpleNamespace(weight=weight, variance_epsilon=case.model.eps, eps=case.model.eps)


def _norm(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = K.fast_rms_layernorm(_like_norm(case, weight), x, gemma=case.model.norm == "gemma")
    return y


def _rms_norm(case: Case, t: Inputs) -> Forward:
    return lambda: (_norm(case, t["x"], t["weight"]),)


def _add_rms_norm(case: Case, t: Inputs) -> Forward:
    def call() -> tuple[Tensor, ...]:
        s = t["residual"] + t["x"]
        return _norm(case, s, t["weight"]), s

    return call


def _turn(q: Tensor, k: Tensor, t: Inputs) -> tuple[Tensor, ...]:
    q, k = K.fast_rope_embedding(q.transpose(1, 2), k.transpose(1, 2), t["cos"], t["sin"])
    return q.transpose(1, 2), k.transpose(1, 2)


def _rope(case: Case, t: Inputs) -> Forward:
    return lambda: _turn(t["q"], t["k"], t)


def _qk_norm_rope(case: Case, t: Inputs) -> Forward:
    if case.model.norm == "gemma":
        return lambda: _turn(_norm(case, t["q"], t["q_weight"]), _norm(case, t["k"], t["k_weight"]), t)
    fused = importlib.import_module("unsloth.kernels.qk_norm_rope").fast_qk_norm_rope
    norms = [_like_norm(case, t[f"{n}_weight"]) for n in ("q", "k")]

    def call() -> tuple[Tensor, ...]:
        q, k = fused(*norms, t["q"], t["k"], t["cos"], t["sin"])
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


class _Gated(torch.autograd.Function):
    """Unsloth calls these two kernels inside its MLP; here they stand alone. The backward writes over what it reads."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, forward: Any, backward: Any) -> Tensor:
        ctx.kept, ctx.run = (gate, up), backward
        y: Tensor = forward(gate[None], up[None])[0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.kept
        _, df, de = ctx.run(dy, gate, up)  # down's input again, the gradient of up, that of gate
        return de, df, None, None


def _swiglu(case: Case, t: Inputs) -> Forward:
    pair = K.swiglu_fg_kernel, K.swiglu_DWf_DW_dfg_kernel
    return lambda: (_Gated.apply(t["gate"], t["up"], *pair),)


def _geglu(case: Case, t: Inputs) -> Forward:
    pair = K.geglu_approx_forward_kernel, K.geglu_approx_backward_kernel
    return lambda: (_Gated.apply(t["gate"], t["up"], *pair),)


def _cross_entropy(case: Case, t: Inputs) -> Forward:
    return lambda: (K.fast_cross_entropy_loss(t["logits"][None], t["labels"][None]),)


def _linear_cross_entropy(case: Case, t: Inputs) -> Forward:
    loss = importlib.import_module("unsloth_zoo.fused_losses.cross_entropy_loss").unsloth_fused_ce_loss

    def call() -> tuple[Tensor, ...]:
        return (loss(None, t["x"][None], t["head"], None, t["labels"][None], shift_labels=False),)

    return call


def _dequantize_4bit(case: Case, t: Inputs) -> Forward:
    return lambda: (K.fast_dequantize(t["w"].data, t["w"].quant_state),)


def _lora(case: Case, t: Inputs) -> Forward:
    parts = PROJECTIONS.get(case.op, (case.part,))
    tensors = [v for p in parts for v in (t[p], t[p].quant_state, t[f"{p}_a"], t[f"{p}_b"], 1.0)]
    x = t["x"][None]

    def call() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if case.op == "lora_linear":
                return (LORA.LoRA_W.apply(x, *tensors)[0],)
            if case.op == "lora_qkv":
                return tuple(y[0] for y in LORA.LoRA_QKV.apply(x, *tensors, False))
            silu = case.model.activation == "silu"
            pair = (K.swiglu_fg_kernel, K.swiglu_DWf_DW_dfg_kernel)
            if not silu:
                pair = (K.geglu_approx_forward_kernel, K.geglu_approx_backward_kernel)
            return (LORA.LoRA_MLP.apply(x, *tensors, *pair, False)[0],)

    return call


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
    "lora_linear": _lora,
    "lora_qkv": _lora,
    "lora_mlp": _lora,
}
ABSENT = {"adamw8bit": "Unsloth has no optimiser of its own: it takes bitsandbytes'"}
