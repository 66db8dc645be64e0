"""Plain PyTorch as transformers runs it, PEFT's LoRA layers and bitsandbytes: what everyone has without fused ops.

`FUNCTIONS` are the same computations as functions of tensors, which is what torch.compile is given.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparkproof.bench.inputs import PROJECTIONS, Builder, Forward, Inputs
from sparkproof.bench.shapes import Case

Function = Callable[[Case, Inputs], tuple[Tensor, ...]]


def version() -> str:
    """Of the three packages."""
    return ", ".join(f"{p} {metadata.version(p)}" for p in ("transformers", "peft", "bitsandbytes"))


def norm(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm.forward or Gemma3RMSNorm.forward."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + case.model.eps)
    if case.model.norm == "gemma":
        return (h * (1.0 + weight.float())).type_as(x)
    return weight * h.to(x.dtype)


def _rms_norm(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (norm(case, t["x"], t["weight"]),)


def _add_rms_norm(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    s = t["residual"] + t["x"]
    return norm(case, s, t["weight"]), s


def _turn(q: Tensor, k: Tensor, t: Inputs) -> tuple[Tensor, ...]:
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), t["cos"][None], t["sin"][None])
    return q.transpose(1, 2), k.transpose(1, 2)


def _rope(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return _turn(t["q"], t["k"], t)


def _qk_norm_rope(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return _turn(norm(case, t["q"], t["q_weight"]), norm(case, t["k"], t["k_weight"]), t)


def _swiglu(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (F.silu(t["gate"]) * t["up"],)


def _geglu(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (F.gelu(t["gate"], approximate="tanh") * t["up"],)


def _cross_entropy(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (F.cross_entropy(t["logits"].float(), t["labels"]),)


def _linear_cross_entropy(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (F.cross_entropy(F.linear(t["x"], t["head"]).float(), t["labels"]),)


def _lora(t: Inputs, part: str, x: Tensor) -> Tensor:
    """One layer as PEFT's Linear4bit computes it, under autocast."""
    weight = t[part]
    y = bnb.matmul_4bit(x, weight.t(), quant_state=weight.quant_state)
    return y + F.linear(F.linear(x.to(t[f"{part}_a"].dtype), t[f"{part}_a"]), t[f"{part}_b"])


def _activated(case: Case, gate: Tensor) -> Tensor:
    return F.silu(gate) if case.model.activation == "silu" else F.gelu(gate, approximate="tanh")


def _lora_all(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    with torch.autocast(t["x"].device.type, dtype=torch.bfloat16):
        if case.op == "lora_mlp":
            gate, up = (_lora(t, p, t["x"]) for p in ("gate", "up"))
            return (_lora(t, "down", _activated(case, gate) * up),)
        return tuple(_lora(t, p, t["x"]) for p in PROJECTIONS.get(case.op, (case.part,)))


FUNCTIONS: dict[str, Function] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "lora_linear": _lora_all,
    "lora_qkv": _lora_all,
    "lora_mlp": _lora_all,
}


def _function(case: Case, t: Inputs) -> Forward:
    call = FUNCTIONS[case.op]
    return lambda: call(case, t)


def _dequantize_4bit(case: Case, t: Inputs) -> Forward:
    return lambda: (bnb.functional.dequantize_4bit(t["w"].data, t["w"].quant_state),)


def lora_layer(t: Inputs, part: str, rank: int) -> nn.Module:
    """PEFT's layer over bitsandbytes' with the case's own weights and adapters in it; alpha is the rank."""
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    a, b = t[f"{part}_a"], t[f"{part}_b"]
    base = bnb.nn.Linear4bit(a.shape[1], b.shape[0], bias=False, compute_dtype=torch.bfloat16, device="meta")
    base.weight = t[part]
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False)
    try:
        layer: Any = Linear4bit(base, "default", config=config, r=rank, lora_alpha=rank, init_lora_weights=False)
    except TypeError:  # before PEFT 0.19 a layer took no configuration
        layer = Linear4bit(base, "default", r=rank, lora_alpha=rank, init_lora_weights=False)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
    return layer.train()  # type: ignore[no-any-return]


def _lora_modules(case: Case, t: Inputs) -> Forward:
    parts = PROJECTIONS.get(case.op, (case.part,))
    layers = [lora_layer(t, p, case.rank) for p in parts]
    kind = t["x"].device.type

    def call() -> tuple[Tensor, ...]:
        with torch.autocast(kind, dtype=torch.bfloat16):
            if case.op == "lora_mlp":
                gate, up, down = layers
                return (down(_activated(case, gate(t["x"])) * up(t["x"])),)
            return tuple(layer(t["x"]) for layer in layers)

    return call


def _adamw8bit(case: Case, t: Inputs) -> Forward:
    # Below 4096 elements bitsandbytes keeps 32-bit moments; so does sparktune.
    optimiser = bnb.optim.AdamW8bit(t["params"], lr=1e-3, weight_decay=0.0)

    def step() -> tuple[Tensor, ...]:
        optimiser.step()
        return tuple(t["params"])

    return step


BUILDERS: dict[str, Builder] = {op: _function for op in FUNCTIONS if not op.startswith("lora_")} | {
    "dequantize_4bit": _dequantize_4bit,
    "lora_linear": _lora_modules,
    "lora_qkv": _lora_modules,
    "lora_mlp": _lora_modules,
    "adamw8bit": _adamw8bit,
}
