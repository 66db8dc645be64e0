"""The frozen weight of a linear layer, dense or in 4 bits: one thing to pass about, and to write where a GEMM wants it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparktune.ops import dequantize_4bit as fourbit
from sparktune.ops.dequantize_4bit import Nested

Flat = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, str]


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in row-major order.

    Dense: `data` is the matrix, the rest is unset. 4-bit: `data` holds the codes and `absmax` the scales, fp32, or uint8
    with `nested`; `quant_type` is nf4 or fp4.
    """

    data: Tensor
    shape: tuple[int, int]
    absmax: Tensor | None = None
    nested: Nested | None = None
    blocksize: int = 64
    quant_type: str = ""

    @classmethod
    def of(cls, source: Any) -> Weight:
        """From a `Linear`, a bitsandbytes `Linear4bit` or `Params4bit`, or a matrix.

        Errors: ValueError for a 4-bit weight that was not quantised yet, or one that is no matrix.
        """
        weight = getattr(source, "weight", source)
        state = getattr(weight, "quant_state", None)
        if state is None:
            if weight.dim() != 2 or not weight.is_floating_point():
                raise ValueError(
                    f"a weight must be a floating [N, K] or quantised, got {weight.dtype} {list(weight.shape)}; "
                    "bitsandbytes quantises when a module is moved to its device"
                )
            return cls(weight.detach(), (weight.shape[0], weight.shape[1]))
        n, k = state.shape
        return cls.of_state(weight, state, (n, k))

    @classmethod
    def of_state(cls, codes: Tensor, state: Any, shape: tuple[int, int]) -> Weight:
        """From codes and the bitsandbytes `QuantState` that goes with them, as a matrix [N, K]."""
        nested = None
        if state.state2 is not None:
            nested = Nested(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
        absmax = state.absmax if nested else state.absmax.float()
        return cls(fourbit.as_bytes(codes.detach()), shape, absmax, nested, state.blocksize, state.quant_type)

    @property
    def quantized(self) -> bool:
        """Whether it is kept in 4 bits."""
        return self.absmax is not None

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.data.device

    def into(self, out: Tensor) -> None:
        """Write the matrix into `out` [N, K], a view with unit stride along K, in out's dtype; nothing beside it."""
        if out.shape != self.shape:
            raise ValueError(f"a weight of {list(self.shape)} does not fit {list(out.shape)}")
        if self.absmax is None:
            out.copy_(self.data)
        else:
            fourbit.write(out, self._codes, self.absmax, self.blocksize, self.nested, self.quant_type)

    @functools.cached_property
    def _codes(self) -> Tensor:
        """The codes as bytes; that all parts fit each other is checked once, since a step asks 20 times a layer."""
        assert self.absmax is not None
        codes = fourbit.as_bytes(self.data)
        fourbit.check(codes, self.absmax, self.blocksize, self.shape, self.nested, self.quant_type)
        return codes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`: a dense one is itself where it already has it."""
        if self.absmax is None:
            return self.data.to(dtype)
        return fourbit.dequantize_4bit(
            self.data, self.absmax, self.blocksize, self.shape, dtype, self.nested, self.quant_type
        )

    def reference(self, dtype: torch.dtype, compute: torch.dtype = torch.float32) -> Tensor:
        """The matrix in `dtype` by plain PyTorch, differentiable in nothing; float64 for both gives the oracle's."""
        if self.absmax is None:
            return self.data.to(dtype)
        return fourbit.reference(
            self.data, self.absmax, self.blocksize, self.shape, dtype, self.nested, self.quant_type, compute
        )

    def flat(self) -> Flat:
        """(data, absmax, absmax2, code2, offset, blocksize, scales an absmax2, quant_type): what a custom op can take."""
        if self.nested is None:
            return self.data, self.absmax, None, None, None, self.blocksize, 1, self.quant_type
        inner = self.nested
        return (
            self.data, self.absmax, inner.absmax, inner.code, inner.offset, self.blocksize, inner.blocksize, self.quant_type,
        )  # fmt: skip

    @classmethod
    def from_flat(cls, flat: Flat, shape: tuple[int, int]) -> Weight:
        """The inverse of `flat`; 4-bit codes do not know their shape."""
        data, absmax, absmax2, code2, offset, blocksize, per_scale, quant_type = flat
        nested = None
        if absmax2 is not None and code2 is not None and offset is not None:
            nested = Nested(absmax2, code2, offset, per_scale)
        return cls(data, shape, absmax, nested, blocksize, quant_type)
