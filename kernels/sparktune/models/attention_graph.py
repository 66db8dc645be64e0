"""Attention inside a hand-written backward: run now, differentiated later, its inputs free to be forgotten in between.

A layer's own Function keeps attention's output and log-sum-exp, and makes q, k and v again from the layer's input. So what
PyTorch's kernels save for their backward is kept as it is, but for tensors that lie in q's, k's or v's memory: of those only
the place is kept, and they are read from the memory that is there when the backward runs. This holds for whichever backend
`sparktune.ops.attention` chose.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from sparktune.models.attention import attend
from sparktune.models.documents import Documents


class _Inputs:
    """q, k and v of a call: where they lay, and where they lie now.

    The graph's saved-tensor hooks belong to this object, not to `Attended`: that holds the graph, and a graph whose hooks
    held it would be a cycle through C++ that no garbage collector sees. It kept 84 MB a layer and step (2 x 2048 tokens).
    """

    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        self.leaves = leaves
        self.memory: dict[int, int] = {}
        self.saved: list[weakref.ReferenceType[Tensor]] = []  # what else the graph keeps
        for i, t in enumerate(leaves):
            self.memory.setdefault(t.untyped_storage().data_ptr(), i)
        self.now = leaves

    def pack(self, t: Tensor) -> Any:
        """What to keep of a tensor that the graph saves: the place of one in q's, k's or v's memory, else its values."""
        at = self.memory.get(t.untyped_storage().data_ptr())
        if at is None or t.numel() == 0:
            kept = t.detach()  # `t` can be the graph's own output, whose reference to the graph would close a cycle too
            self.saved.append(weakref.ref(kept))
            return kept
        origin = self.leaves[at]
        return at, t.shape, t.stride(), t.storage_offset() - origin.storage_offset(), t.dtype

    def unpack(self, kept: Any) -> Tensor:
        """The tensor, read from the memory that is there now."""
        if isinstance(kept, Tensor):
            return kept
        at, shape, stride, offset, dtype = kept
        t = self.now[at].detach()
        return t.view(dtype).as_strided(shape, stride, t.storage_offset() + offset)


class Attended:
    """One call of attention: its output, and its derivative for as long as this object lives."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, scale: float, window: int | None,
        softcap: float | None, sinks: Tensor | None,
    ) -> None:  # fmt: skip
        """q [B, S, H, D], k and v [B, S, Hkv, D], any views with unit last stride."""
        self._inputs = _Inputs(tuple(t.detach().requires_grad_() for t in (q, k, v)))
        hooks = torch.autograd.graph.saved_tensors_hooks(self._inputs.pack, self._inputs.unpack)
        with torch.enable_grad(), hooks:
            self._output: Any = attend(*self._leaves(), documents, None, scale, window, softcap, sinks)
        self.output = self._output.detach()
        self._copies: list[tuple[Tensor, torch.Size, tuple[int, ...], int]] = []  # of the output, that the graph keeps

    def _leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._inputs.leaves
        return q, k, v

    def forget_inputs(self) -> None:
        """Let go of q, k and v; `gradients` then wants them again."""
        # A leaf of the graph has to live, but not its memory: what it holds is exchanged for nothing.
        for t in self._inputs.leaves:
            t.data = t.new_empty(0)
        self._inputs.now = ()

    def forget_output(self) -> Tensor:
        """Let go of the output, which is returned; `gradients` then wants it back by `return_output`."""
        out = self.output
        memory, offset = out.untyped_storage().data_ptr(), out.storage_offset()
        for t in (ref() for ref in self._inputs.saved):
            if t is not None and t.numel() and t.untyped_storage().data_ptr() == memory:
                self._copies.append((t, t.shape, t.stride(), int(t.storage_offset() - offset)))
                t.data = t.new_empty(0)
        # What is differentiated is a place in the graph; a tensor that stood for it would need the output's shape.
        self._output = torch.autograd.graph.get_gradient_edge(self._output)
        self.output = out.new_empty(0)
        return out

    def return_output(self, out: Tensor) -> None:
        """The output as it was forgotten, in the same layout."""
        self.output = out
        for t, shape, strides, offset in self._copies:
            t.data = out.as_strided(shape, strides, out.storage_offset() + offset)
        self._copies = []

    def gradients(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) for an output gradient [B, S, H, D]; q, k and v as they were, in the same layout. Once."""
        self._inputs.now = (q, k, v)
        dq, dk, dv = torch.autograd.grad(self._output, self._inputs.leaves, dout)
        self._inputs.now = ()
        return dq, dk, dv
