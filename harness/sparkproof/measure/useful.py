"""What a step has to do at least, in flops and bytes: what MFU and the speed of light are reckoned from.

Flops that no implementation can skip, of real tokens only, recomputation not counted: products of the frozen base forward and for
their input's gradient (their weights need none), LoRA's three ways, causal attention forward and 2.5 times that backward, the
head forward and backward. Bytes: each stored weight read once forward and once backward. Source: Chowdhery et al., "PaLM", 2022,
appendix B, for MFU; Williams et al., "Roofline", 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """Of a model: flops a token (attention apart), flops a squared token of a row, and bytes a step."""

    per_token: float
    per_square: float
    bytes: float

    @classmethod
    def of(cls, config: Any, lora_elements: int, load_in_4bit: bool) -> Work:
        """From a transformers configuration and LoRA's number of elements. Errors: ValueError for experts or latent attention."""
        from sparktune.planning import ModelShape
        from sparktune.planning.predict import NF4

        s = ModelShape.of(config)
        layers, head = s.layer_weights * s.layers, s.vocabulary * s.hidden
        return cls(
            per_token=4.0 * layers + 6.0 * lora_elements + 4.0 * head,
            per_square=3.5 * 2 * s.q * s.layers,
            bytes=2 * (layers * (NF4 if load_in_4bit else 2) + head * 2),
        )

    def flops(self, rows: Sequence[int]) -> float:
        """Of one step over rows of so many real tokens, each attending to itself alone."""
        return self.per_token * sum(rows) + self.per_square * sum(n * n for n in rows)

    def floor_s(self, flops: float, gemm_flops: float, copy_bytes: float) -> float:
        """Seconds of a step at the device's own rates (a second): its products, and reading its weights; nothing overlaps."""
        return flops / gemm_flops + self.bytes / copy_bytes
