"""A 4-bit linear layer whose weight is dequantised by `sparktune.ops.dequantize_4bit`, forward and backward.

    y  = x W^T + b      x [..., in], W [out, in] = dequant(packed), y [..., out]
    dx = dy W           W dequantised again: keeping it would cost 2 bytes a weight for every layer
    db = sum of dy over all but the last dimension

The base weight gets no gradient: in QLoRA (Dettmers et al. 2023) it is frozen. Saved for backward are the packed weight
and its state, 0.52 bytes a weight and shared with the layer, never a dequantised copy. W is made in x's dtype, the
layer's compute dtype, so matrix products run in the type that the layer declares.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch.autograd.function import once_differentiable

from sparktune.ops.dequantize_4bit import Nested, dequantize_4bit


class Nf4MatMul(torch.autograd.Function):
    """x [..., in] times a frozen NF4 weight; see the module for the maths."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> Any:
        """y = x dequant(packed)^T + bias."""
        ctx.save_for_backward(packed)
        ctx.state = state
        return torch.nn.functional.linear(x, dequantize(packed, state, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """dx = dy W and, where asked for, db; nothing for the packed weight."""
        (packed,) = ctx.saved_tensors
        want_x, _, _, want_bias = ctx.needs_input_grad
        grad_x = grad @ dequantize(packed, ctx.state, grad.dtype) if want_x else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if want_bias else None
        return grad_x, None, None, grad_bias


def dequantize(packed: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`, from bitsandbytes' storage (nested statistics or not)."""
    nested = None
    if state.nested:
        outer = state.state2
        nested = Nested(outer.absmax, outer.code, state.offset, outer.blocksize)
    out: torch.Tensor = dequantize_4bit(
        packed, state.absmax, state.blocksize, tuple(state.shape), dtype, nested, state.quant_type
    )
    return out


class Nf4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' Linear4bit with sparktune's product; storage, saving and loading are unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], computed in `compute_dtype`, returned in x's dtype."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        weight: Any = self.weight  # a Params4bit
        out: torch.Tensor = Nf4MatMul.apply(x.to(dtype), weight, weight.quant_state, bias)
        return out.to(x.dtype)


def refuse_linear(module: Any) -> str:
    """Why this Linear4bit can't run the op: another format, not quantised yet, repacked, or stored transposed."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet"
    if state.quant_type != "nf4":
        return f"its format is {state.quant_type}, not nf4"
    if getattr(state, "packing_format_for_cpu", False):
        return "its weight was repacked for AVX512-BF16"
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"its weight is stored as {tuple(state.shape)}, not [out, in]"
    return ""
