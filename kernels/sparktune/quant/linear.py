"""A 4-bit linear layer whose product runs through `sparktune.ops.lora_linear`, forward and backward.

    y  = x W^T + b      x [..., in], W [out, in] = dequant(packed), y [..., out]
    dx = dy W           W dequantised again: keeping it would cost 2 bytes a weight for every layer

The base weight gets no gradient: in QLoRA (Dettmers et al. 2023) it is frozen. Saved for backward are the packed weight
and its scales, 0.52 bytes a weight and shared with the layer, never a dequantised copy.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch

from sparktune.ops.lora_linear import lora_linear
from sparktune.ops.weights import Weight


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' Linear4bit with sparktune's product; storage, saving and loading are unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], computed in `compute_dtype`, returned in x's dtype."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return lora_linear(x.to(dtype), Weight.of(self), bias=bias).to(x.dtype)


def refuse_linear(module: Any) -> str:
    """Why this Linear4bit can't run the op: not quantised yet, repacked, or stored transposed."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "its weight was repacked for AVX512-BF16"
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"its weight is stored as {tuple(state.shape)}, not [out, in]"
    return ""
