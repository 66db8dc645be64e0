"""The Llama family (Llama 2 and 3, SmolLM2, TinyLlama ...; transformers `model_type: llama`).

=====================  =======================  ===================================================================
module                 op                       computes
=====================  =======================  ===================================================================
LlamaRMSNorm           rms_norm (llama order)   y = w * cast(x / sqrt(mean(x^2) + eps)), rounded before the weight
LlamaMLP               swiglu                   down(silu(gate(x)) * up(x)); the three projections stay modules
bitsandbytes Linear4bit  dequantize_4bit        y = x dequant(W)^T + b, and dx = dy dequant(W)
=====================  =======================  ===================================================================

The projections stay modules because PEFT puts its LoRA layers in their place. Attention, RoPE, embedding, lm_head and
loss are transformers' own.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from sparktune.models.patch import Rule
from sparktune.ops.rms_norm import rms_norm
from sparktune.ops.swiglu import swiglu
from sparktune.quant.linear import Nf4Linear, refuse_linear


class SparkLlamaRMSNorm(LlamaRMSNorm):
    """LlamaRMSNorm through `sparktune.ops.rms_norm`; x [..., hidden] -> the same shape and dtype."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, variant="llama")


class SparkLlamaMLP(LlamaMLP):
    """LlamaMLP with the product silu(gate) * up in one op; x [..., hidden] -> [..., hidden]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project up twice, gate, project down."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _refuse_norm(module: Any) -> str:
    return "" if module.weight.is_floating_point() else f"weight of type {module.weight.dtype}"


def _refuse_mlp(module: Any) -> str:
    # transformers' SiLUActivation and torch's own are the same function; anything else is another product.
    silu = isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
    return "" if silu else f"its activation is {type(module.act_fn).__name__}, not SiLU"


RULES = (
    Rule("rms_norm", LlamaRMSNorm, SparkLlamaRMSNorm, _refuse_norm),
    Rule("swiglu", LlamaMLP, SparkLlamaMLP, _refuse_mlp),
    Rule("dequantize_4bit", bnb.nn.Linear4bit, Nf4Linear, refuse_linear),
)
