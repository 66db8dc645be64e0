"""The tensors that every engine gets for a case: the same values in the same layout, made from the case alone.

Activations are bf16. LoRA's A and B are fp32, as PEFT keeps them, and the weights under them NF4 with nested scales.
Norm weights, tables, labels and the head are frozen, as in QLoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparkproof.bench.shapes import Case

Inputs = dict[str, Any]
Forward = Callable[[], tuple[Tensor, ...]]
Builder = Callable[[Case, Inputs], Forward]
IGNORED = -100
PROJECTIONS = {"lora_qkv": ("q", "k", "v"), "lora_mlp": ("gate", "up", "down")}


def make(case: Case, device: torch.device, index: int = 0, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """One set; another `index` gives other values."""
    g = torch.Generator(device=device).manual_seed(1000 * index + 7)
    m, t = case.model, case.tokens

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=to).normal_(0, scale, generator=g)

    def leaf(*shape: int) -> Tensor:
        return normal(*shape).requires_grad_(True)

    match case.op:
        case "rms_norm" | "add_rms_norm":
            found: Inputs = {"x": leaf(t, m.hidden)}
            if case.op == "add_rms_norm":
                found["residual"] = leaf(t, m.hidden)
            return found | {"weight": normal(m.hidden, scale=0.1) + (0 if m.norm == "gemma" else 1)}
        case "rope" | "qk_norm_rope":
            found = {"q": leaf(1, t, m.heads, m.head_dim), "k": leaf(1, t, m.kv_heads, m.head_dim)}
            if case.op == "qk_norm_rope":
                centre = 0 if m.norm == "gemma" else 1
                found |= {f"{n}_weight": normal(m.head_dim, scale=0.1) + centre for n in ("q", "k")}
            return found | tables(t, m.head_dim, device)
        case "swiglu" | "geglu":
            return {"gate": leaf(t, m.intermediate), "up": leaf(t, m.intermediate)}
        case "cross_entropy":
            return {"logits": leaf(t, m.vocab), "labels": _labels(t, m.vocab, device, g)}
        case "linear_cross_entropy":
            head = normal(m.vocab, m.hidden, scale=m.hidden**-0.5)
            return {"x": leaf(t, m.hidden), "head": head, "labels": _labels(t, m.vocab, device, g)}
        case "dequantize_4bit":
            return {"w": nf4(normal(*m.linear(case.part), scale=0.02))}
        case "adamw8bit":
            # From zero, so that what is compared after a step is the step.
            params = [nn.Parameter(torch.zeros(s, device=device)) for s in case.adapters]
            for p in params:
                p.grad = normal(*p.shape, scale=1e-3, to=torch.float32)
            return {"params": params}
    parts = PROJECTIONS.get(case.op, (case.part,))
    found = {"x": leaf(t, m.linear(parts[0])[1])}
    for part in parts:
        n, k = m.linear(part)
        found[f"{part}"] = nf4(normal(n, k, scale=k**-0.5))
        found[f"{part}_a"] = nn.Parameter(normal(case.rank, k, scale=k**-0.5, to=torch.float32))
        found[f"{part}_b"] = nn.Parameter(normal(n, case.rank, scale=case.rank**-0.5, to=torch.float32))
    return found


def nf4(weight: Tensor) -> Any:
    """bitsandbytes' Params4bit of a matrix, NF4 with nested scales."""
    import bitsandbytes as bnb

    data, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.nn.Params4bit(
        data, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=True, quant_type="nf4",
        bnb_quantized=True,
    )  # fmt: skip


def tables(tokens: int, width: int, device: torch.device) -> Inputs:
    """cos and sin [tokens, width] in bf16, as models make them, and [tokens, width / 2] in fp32."""
    inverse = 10000.0 ** -(torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(tokens, device=device)[:, None] * inverse
    half = {"cos": angles.cos().bfloat16().float(), "sin": angles.sin().bfloat16().float()}
    return {f"{k}_half": v for k, v in half.items()} | {k: torch.cat((v, v), -1).bfloat16() for k, v in half.items()}


def _labels(tokens: int, vocab: int, device: torch.device, g: torch.Generator) -> Tensor:
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=g)
    labels[::16] = IGNORED
    return labels


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Those that a gradient is taken of."""
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}


def size(inputs: Inputs) -> int:
    """Bytes of a set."""
    every = [t for v in inputs.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    return sum(math.prod(t.shape) * t.element_size() for t in every)
