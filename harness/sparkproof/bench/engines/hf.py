"""transformers, PEFT and bitsandbytes, in plain PyTorch as a transformers model runs them.

Importing Unsloth replaces functions of all three. `capture()` keeps what this file calls, before that, and `restore()` puts it
back, so that what is measured under this name is what these libraries ship.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn

from sparkproof.bench.cases import LR, Call, Case

WRITES: frozenset[str] = frozenset()
MISSING: dict[str, str] = {}
_kept: list[tuple[Any, str, Any]] = []
_options: list[tuple[Any, dict[str, Any]]] = []  # of the compiler, which Unsloth sets for the whole process
_precision: list[str] = []


def refusal() -> str:
    """Runs wherever it is installed."""
    return ""


def capture() -> None:
    """Keep what Unsloth may replace; the first call counts."""
    if _kept:
        return
    import bitsandbytes as bnb
    import peft.tuners.lora.bnb as lora_bnb
    import transformers.loss.loss_utils as losses
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama

    for owner, names in (
        (modeling_llama, ("LlamaRMSNorm", "apply_rotary_pos_emb", "rotate_half")),
        (modeling_llama.LlamaRMSNorm, ("forward",)),
        (modeling_gemma3, ("Gemma3RMSNorm",)),
        (modeling_gemma3.Gemma3RMSNorm, ("forward", "_norm")),
        (losses, ("ForCausalLMLoss", "fixed_cross_entropy")),
        (bnb, ("matmul_4bit",)),
        (bnb.functional, ("dequantize_4bit",)),
        (bnb.nn.Linear4bit, ("forward",)),
        (getattr(lora_bnb, "Linear4bit", None), ("forward",)),
        (nn.functional, ("cross_entropy", "linear", "silu", "gelu")),
        (torch, ("compile",)),
    ):
        if owner is not None:
            _kept.extend((owner, name, getattr(owner, name)) for name in names)
    _options.extend((c, c.get_config_copy()) for c in (torch._dynamo.config, torch._inductor.config))
    _precision.append(torch.get_float32_matmul_precision())


def restore() -> list[str]:
    """Put back what was replaced since; what that was, by name."""
    found = []
    for owner, name, value in _kept:
        if getattr(owner, name) is not value:
            setattr(owner, name, value)
            module = f"{owner.__module__}." if isinstance(owner, type) else ""
            found.append(f"{module}{owner.__name__}.{name}")
    for config, was in _options:
        for name, value in was.items():
            with contextlib.suppress(Exception):  # some options refuse to be read, or to be set
                if getattr(config, name) != value:
                    setattr(config, name, value)
                    found.append(f"{config.__name__}.{name}")
    for precision in _precision:
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
            found.append("the precision of fp32 products")
    return found


def norm_module(case: Case, weight: Tensor) -> nn.Module:
    """The model's own norm class, with a frozen weight."""
    kind: Any
    if case.model.norm == "gemma":  # whose file takes seconds to import
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm as kind
    else:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as kind
    module: nn.Module = kind(weight.shape[0], eps=case.model.eps)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _rms_norm(case: Case) -> Call:
    norm = norm_module(case, case.shared["weight"])
    return lambda t: (norm(t["x"]),)


def _add_rms_norm(case: Case) -> Call:
    norm = norm_module(case, case.shared["weight"])

    def call(t: dict[str, Any]) -> tuple[Tensor, Tensor]:
        s = t["residual"] + t["x"]
        return norm(s), s

    return call


def _rope(case: Case) -> Call:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = case.shared["cos_doubled"], case.shared["sin_doubled"]

    def call(t: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k = apply_rotary_pos_emb(t["q"].transpose(1, 2), t["k"].transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def _qk_norm_rope(case: Case) -> Call:
    q_norm, k_norm = (norm_module(case, case.shared[f"{n}_weight"]) for n in ("q", "k"))
    turn = _rope(case)
    return lambda t: turn({"q": q_norm(t["q"]), "k": k_norm(t["k"])})


def _swiglu(case: Case) -> Call:
    return lambda t: (nn.functional.silu(t["gate"]) * t["up"],)


def _geglu(case: Case) -> Call:
    return lambda t: (nn.functional.gelu(t["gate"], approximate="tanh") * t["up"],)


def _cross_entropy(case: Case) -> Call:
    from transformers.loss.loss_utils import ForCausalLMLoss

    vocab = case.model.vocab
    return lambda t: (ForCausalLMLoss(t["logits"], None, vocab, shift_labels=t["labels"]),)


def _linear_cross_entropy(case: Case) -> Call:
    from transformers.loss.loss_utils import ForCausalLMLoss

    vocab, weight = case.model.vocab, case.shared["weight"]

    def call(t: dict[str, Any]) -> tuple[Tensor]:
        logits = nn.functional.linear(t["hidden"], weight)
        return (ForCausalLMLoss(logits, None, vocab, shift_labels=t["labels"]),)

    return call


def _dequantize_4bit(case: Case) -> Call:
    from bitsandbytes.functional import dequantize_4bit

    return lambda t: (dequantize_4bit(t["packed"], t["state"]),)


def _lora_linear(case: Case) -> Call:
    layer = getattr(case.shared["module"], f"{case.row.kind.part}_proj")
    return lambda t: (layer(t["x"]),)


def _lora_qkv(case: Case) -> Call:
    m = case.shared["module"]
    return lambda t: (m.q_proj(t["x"]), m.k_proj(t["x"]), m.v_proj(t["x"]))


def _lora_mlp(case: Case) -> Call:
    m = case.shared["module"]
    return lambda t: (m.down_proj(m.act_fn(m.gate_proj(t["x"])) * m.up_proj(t["x"])),)


def _adamw8bit(case: Case) -> Call:
    import bitsandbytes as bnb

    params = case.shared["owned"]()
    optimizer = bnb.optim.AdamW8bit(params, lr=LR)

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
