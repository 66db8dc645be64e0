"""The buffer of a layer's weights in 16 bits, kept from one use to the next where a memory budget has room left for it.

A 4-bit weight is otherwise written out twice a step, once for the forward and once for the backward, and read back by the
product each time: 4.7 of 78 ms of a step on an H100 (Llama-3.1-8B, 2 x 2048 tokens, all activations kept), and a larger share on
a GB10, whose memory is a twelfth as fast. What lies around the weights in the buffer (sB and A, `ops.lora_packed`) changes
every step and is written anew in every forward; a backward whose forward was the last to write it finds it as it left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.lora_packed import Stack, pack
from sparktune.ops.weights import Weight


class Held:
    """A `Stack`'s buffer, or none yet."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.serial = 0  # counts what was written around the weights
        self._made_of: tuple[Any, ...] = ()
        self._stream = 0  # in whose order alone the buffer may be written again
        self._stack: Stack | None = None  # its weights live on, so that no others can come to lie where they did

    def release(self) -> None:
        """Give the memory back."""
        self.buffer = self._stack = None
        self._made_of = ()

    def pack(
        self, stack: Stack, a: Sequence[Tensor | None], b: Sequence[Tensor | None], bias: Sequence[Tensor | None],
        scales: Sequence[float], dtype: torch.dtype, serial: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As `lora_packed.pack`, the weights from the last time where they are what they were then.

        `serial`: what `self.serial` was when the caller's factors were written; they are not written again if nobody
        else's were since.
        """
        device = stack.weights[0].device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        made_of, stream = _made_of(stack), dispatch.stream_of(device)
        if (
            self.buffer is not None
            and self.buffer.dtype == dtype
            and self._made_of == made_of
            and (capturing or self._stream == stream)  # a graph's stream is nobody's order; who replays it keeps it
        ):
            if serial is None or serial != self.serial:
                self.serial += 1
                pack(stack, a, b, bias, scales, dtype, into=self.buffer, weights=False)
            return self.buffer
        p = pack(stack, a, b, bias, scales, dtype)
        self.serial += 1
        if not capturing:  # memory of a CUDA graph's own pool is the graph's to use again
            self.buffer, self._made_of, self._stack, self._stream = p, made_of, stack, stream
        return p

    def current(self, stack: Stack) -> bool:
        """Whether the buffer holds these weights as they are now."""
        return self.buffer is not None and self._made_of == _made_of(stack)


def _made_of(stack: Stack) -> tuple[Any, ...]:
    """What the weights in a buffer depend on: their memory, and whether it was written to since."""
    return (stack.ranks, stack.biased, *(x for w in stack.weights for x in _of(w)))


def _of(w: Weight) -> tuple[int, ...]:
    parts = [w.data] if w.absmax is None else [w.data, w.absmax]
    if w.nested is not None:
        parts += [w.nested.absmax, w.nested.code, w.nested.offset]
    return tuple(x for t in parts for x in (t.data_ptr(), 0 if t.is_inference() else t._version))
