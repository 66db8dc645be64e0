"""The oracle that the `hf` engine is held to: the same NF4 weights, dequantised and multiplied by plain PyTorch.

`hf` is what other engines are compared with; compared with itself it would always agree. So its 4-bit products and
their gradients are compared with torch's own `linear` over `dequantize_4bit`, differentiated by autograd. The weight is
recomputed in backward (activation checkpointing), so no dense copy of the model is held.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class PlainLinear(bnb.nn.Linear4bit):
    """y = x dequant(W)^T + b by torch alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's dtype, computed in the layer's compute dtype."""
        dtype = self.compute_dtype or x.dtype
        packed: Any = self.weight  # a Params4bit

        def product(x: torch.Tensor) -> torch.Tensor:
            weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)
            return nn.functional.linear(x.to(dtype), weight, self.bias)

        out: torch.Tensor = checkpoint(product, x, use_reentrant=False)
        return out.to(x.dtype)


def make_plain(model: nn.Module) -> int:
    """Turn every bitsandbytes Linear4bit of the model into a PlainLinear; return how many there were."""
    layers = [m for m in model.modules() if type(m) is bnb.nn.Linear4bit]
    for layer in layers:
        layer.__class__ = PlainLinear
    return len(layers)
