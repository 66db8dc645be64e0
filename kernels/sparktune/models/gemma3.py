"""Gemma 3 (transformers `model_type: gemma3_text`, and `gemma3` with a vision tower): Gemma 2 with norms over each head of
q and k instead of a cap on the scores, five layers with a window to one without, and rotary tables for each kind.

A batch of text goes to the text model alone. One with images runs transformers' own forward, masks included, around the
fused layers, and is counted in `projection.fallbacks()`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gemma3 import modeling_gemma3 as hf

from sparktune.models.causal import CausalLM
from sparktune.models.common import pre_norm_family
from sparktune.models.sandwich import SandwichLayer
from sparktune.models.swap import rule


class TextOfImages(CausalLM):
    """The head of a model that takes images too."""

    def forward(  # type: ignore[override]
        self: Any, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, attention_mask: Any = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As transformers' own; `token_type_ids` (1: a token of an image) [B, S] count as images where any is 1."""
        if pixel_values is not None or (token_type_ids is not None and bool((token_type_ids == 1).any())):
            kwargs |= {"pixel_values": pixel_values, "token_type_ids": token_type_ids}
        found = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, **kwargs,
        )  # fmt: skip
        return hf.Gemma3CausalLMOutputWithPast(**found) if hasattr(found, "keys") else found

    @property
    def _decoder(self: Any) -> Any:
        return self.model.language_model

    def _not_fused(self: Any, labels: Tensor | None, shift_labels: Tensor | None, kwargs: dict[str, Any]) -> str | None:
        why = super()._not_fused(labels, shift_labels, kwargs)
        return "the batch has images" if why is None and "token_type_ids" in kwargs else why


RULES = (
    *pre_norm_family(
        causal=hf.Gemma3ForCausalLM, backbone=hf.Gemma3TextModel, layer=hf.Gemma3DecoderLayer,
        attention=hf.Gemma3Attention, mlp=hf.Gemma3MLP, norm=hf.Gemma3RMSNorm, rotary=hf.Gemma3RotaryEmbedding,
        layer_mixin=SandwichLayer, order="gemma", eps="eps", qk_norm="gemma", activation="gelu_tanh",
    ),
    rule("linear_cross_entropy", hf.Gemma3ForConditionalGeneration, TextOfImages),
)  # fmt: skip
