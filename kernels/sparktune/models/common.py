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


def refuse_layer(module: Any) -> str:
    """A layer's residual branches must have no dropout."""
    drops = [d.p for name in ("resid_attn_dropout", "resid_mlp_dropout") if (d := getattr(module, name, None))]
    return f"its residual branches have dropouts of {drops}" if any(drops) else ""


def pre_norm_family(
    *, causal: type[nn.Module], backbone: type[nn.Module], layer: type[nn.Module], attention: type[nn.Module],
    mlp: type[nn.Module] | None, norm: type[nn.Module], rotary: type[nn.Module], head_mixin: type = CausalLM,
    layer_mixin: type = PreNormLayer, order: str = "llama", eps: str = "variance_epsilon", qk_norm: str = "",
    window: str = "", softcap: str = "", activation: str = "silu", activation_name: str = "act_fn",
    merged_qkv: str = "", merged_mlp: str = "", attention_mixin: type = parts.Attention, norm_mixin: type = parts.Norm,
    rotary_mixin: type = parts.Rotary,
) -> tuple[Rule, ...]:  # fmt: skip
    """Llama, and what differs from it in a few known ways.

    What is done with the logits (`head_mixin`), what a layer adds up (`layer_mixin`), the norms' rounding order and their
    attribute with epsilon, norms over each head of q and k (`qk_norm`: their order), where the window is (`window`:
    "config", or the attention module itself), the attention's attribute with the scores' cap, the MLP's activation and
    its attribute, the names of merged projections; attention, norm and rotary embedding of its own; no dense MLP.
    """
    dense = (
        ()
        if mlp is None
        else (
            rule(
                "lora_mlp",
                mlp,
                parts.Mlp,
                parts.refuse_mlp(activation, activation_name),
                ACTIVATION=activation,
                MERGED=merged_mlp,
            ),
        )
    )
    return (
        rule("linear_cross_entropy", causal, head_mixin),
        rule("documents", backbone, Backbone),
        rule("add_rms_norm", layer, layer_mixin, refuse_layer),
        rule(
            "lora_qkv", attention, attention_mixin, QK_NORM=qk_norm, WINDOW=window, SOFTCAP=softcap,
            MERGED=merged_qkv,
        ),
        *dense,
        rule("rms_norm", norm, norm_mixin, refuse_norm, ORDER=order, EPS=eps),
        rule("rope", rotary, rotary_mixin),
        LINEAR_4BIT,
    )  # fmt: skip
