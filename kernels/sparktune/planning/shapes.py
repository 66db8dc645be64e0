"""A decoder's widths, as far as bytes and flops depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparktune.models.checkpointing import LayerShape, strips_of


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with q, k, v, o, gate, up and down projections. Widths in elements."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    head_norms: bool = False

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """From a transformers model or configuration. Errors: ValueError for one with experts or latent attention."""
        config = getattr(model, "config", model)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        odd = [
            n
            for n in ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank")
            if getattr(config, n, None)
        ]
        if odd:
            raise ValueError(f"plan knows dense decoders only; this configuration has {', '.join(odd)}")
        heads = config.num_attention_heads
        return cls(
            name=str(getattr(config, "_name_or_path", "") or config.model_type), layers=config.num_hidden_layers,
            hidden=config.hidden_size, inner=config.intermediate_size, heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", heads) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads, vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings), head_norms=config.model_type in ("qwen3", "gemma3_text"),
        )  # fmt: skip

    @property
    def q(self) -> int:
        """Width of q."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of k, and of v."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each product of a layer, those of one input together."""
        return {
            "qkv": (self.q + 2 * self.kv, self.hidden), "o": (self.hidden, self.q),
            "gate_up": (2 * self.inner, self.hidden), "down": (self.hidden, self.inner),
        }  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's projections."""
        return self.layer().weights

    def lora_elements(self, rank: int) -> int:
        """Elements of A and B of all seven projections of a layer."""
        ins = 5 * self.hidden + self.q + self.inner
        outs = self.q + 2 * self.kv + 2 * self.hidden + 2 * self.inner
        return rank * (ins + outs)

    def layer(self, tokens: int = 1, itemsize: int = 2) -> LayerShape:
        """As the memory budget sees a layer of `tokens` rows."""
        strips = strips_of(tokens)
        return LayerShape(self.hidden, self.q, self.kv, self.heads, self.inner, self.head_norms, itemsize, strips)
