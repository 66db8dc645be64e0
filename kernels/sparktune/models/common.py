"""Rules that families share."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from torch import nn

from sparktune.models import parts
from sparktune.models.causal import Backbone, CausalLM
from sparktune.models.layer import PreNormLayer
from sparktune.models.swap import Rule, rule
from sparktune.quant.linear import Linear4bit, refuse_linear

LINEAR_4BIT = Rule("dequantize_4bit", bnb.nn.Linear4bit, Linear4bit, refuse_linear)


def refuse_norm(module: Any) -> str:
    """A norm's weight must be a plain one."""
    return "" if module.weight.is_floating_point() else f"its weight has the type {module.weight.dtype}"


def pre_norm_family(
    *, causal: type[nn.Module], backbone: type[nn.Module], layer: type[nn.Module], attention: type[nn.Module],
    mlp: type[nn.Module], norm: type[nn.Module], rotary: type[nn.Module], qk_norm: str = "", window: str = "",
    merged_qkv: str = "", merged_mlp: str = "",
) -> tuple[Rule, ...]:  # fmt: skip
    """Llama and what differs from it by names, biases, head norms (`qk_norm`: their order), merged projections or where
    the window is (`window`: "config", or the attention module itself)."""
    return (
        rule("linear_cross_entropy", causal, CausalLM),
        rule("documents", backbone, Backbone),
        rule("add_rms_norm", layer, PreNormLayer),
        rule("lora_qkv", attention, parts.Attention, QK_NORM=qk_norm, WINDOW=window, MERGED=merged_qkv),
        rule("lora_mlp", mlp, parts.Mlp, parts.refuse_mlp("silu"), MERGED=merged_mlp),
        rule("rms_norm", norm, parts.Norm, refuse_norm),
        rule("rope", rotary, parts.Rotary),
        LINEAR_4BIT,
    )
