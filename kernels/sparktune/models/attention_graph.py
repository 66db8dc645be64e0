"""Attention inside a hand-written backward: run now, differentiated later, its inputs free to be forgotten in between.

A layer's own Function keeps attention's output and log-sum-exp, and makes q, k and v again from the layer's input. So what
PyTorch's kernels save for their backward is kept as it is, but for tensors that lie in q's, k's or v's memory: of those only
the place is kept, and they are read from the memory that is there when the backward runs. This holds for whichever backend
`sparktune.ops.attention` chose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparktune.models.attention import attend
from sparktune.models.documents import Documents


class Attended:
    """One call of attention: its output, and its derivative for as long as this object lives."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, scale: float, window: int | None,
        softcap: float | None, sinks: Tensor | None,
    ) -> None:  # fmt: skip
        """q [B, S, H, D], k and v [B, S, Hkv, D], any views with unit last stride."""
        self._inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
        self._memory: dict[int, int] = {}
        for i, t in enumerate(self._inputs):
            self._memory.setdefault(t.untyped_storage().data_ptr(), i)
        self._now: tuple[Tensor, ...] = self._inputs
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            self._output = attend(*self._leaves(), documents, None, scale, window, softcap, sinks)
        self.output = self._output.detach()

    def _leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._inputs
        return q, k, v

    def forget_inputs(self) -> None:
        """Let go of q, k and v; `gradients` then wants them again."""
        # A leaf of the graph has to live, but not its memory: what it holds is exchanged for nothing.
        for t in self._inputs:
            t.data = t.new_empty(0)
        self._now = ()

    def gradients(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) for an output gradient [B, S, H, D]; q, k and v as they were, in the same layout. Once."""
        self._now = (q, k, v)
        dq, dk, dv = torch.autograd.grad(self._output, self._inputs, dout)
        self._now = ()
        return dq, dk, dv

    def _pack(self, t: Tensor) -> Any:
        at = self._memory.get(t.untyped_storage().data_ptr())
        if at is None or t.numel() == 0:
            return t
        origin = self._inputs[at]
        return at, t.shape, t.stride(), t.storage_offset() - origin.storage_offset(), t.dtype

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        at, shape, stride, offset, dtype = kept
        t = self._now[at].detach()
        return t.view(dtype).as_strided(shape, stride, t.storage_offset() + offset)
