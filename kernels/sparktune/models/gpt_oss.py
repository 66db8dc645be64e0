"""gpt-oss, 20b and 120b (transformers `model_type: gpt_oss`): experts everywhere, sinks, windows in every other layer.

Its own: experts with biases, kept [E, H, 2I] with gate and up interleaved and clamped; a learned sink in every head's softmax;
norms that multiply by their weight before they round; rotary tables without repeats.

OpenAI's checkpoints hold the experts in MXFP4, in modules without gradients. They train dequantised to 16 bits, with
`quantization_config=Mxfp4Config(dequantize=True)`, as FastLanguageModel loads them; otherwise every block is left, with
that reason in the report.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gpt_oss import modeling_gpt_oss as hf

from sparktune.models import parts
from sparktune.models.common import pre_norm_family
from sparktune.models.experts import PairExperts, expert_rule, refuse_limits
from sparktune.models.layer import OpByOpLayer


class Norm(parts.Norm):
    """RMSNorm that rounds once, after its weight: what Gemma's order gives for the weight less one."""

    @property
    def gain(self: Any) -> Tensor:
        """weight - 1 in fp32, from which the op makes the weight again: exact for weights of 16 bits near 1."""
        less: Tensor = self.weight.float() - 1.0
        return less


class Rotary(parts.Rotary):
    """The rotary embedding whose tables have half the head's width to begin with."""

    REPEATS = 1


class Attention(parts.Attention):
    """Attention with sinks, which `parts.Attention` finds by their name."""

    REPEATS = 1


class Layer(OpByOpLayer):
    """The layer whose MLP also returns the router's weights."""

    def fed(self: Any, x: Tensor) -> Tensor:
        """What the experts make of x [B, S, K]."""
        found: Tensor = self.mlp(x)[0]
        return found


RULES = (
    *pre_norm_family(
        causal=hf.GptOssForCausalLM, backbone=hf.GptOssModel, layer=hf.GptOssDecoderLayer,
        attention=hf.GptOssAttention, mlp=None, norm=hf.GptOssRMSNorm, rotary=hf.GptOssRotaryEmbedding, layer_mixin=Layer,
        order="gemma",
        attention_mixin=Attention, norm_mixin=Norm, rotary_mixin=Rotary,
    ),
    expert_rule(hf.GptOssMLP, hf.GptOssExperts, PairExperts, refuse_limits),
)  # fmt: skip
