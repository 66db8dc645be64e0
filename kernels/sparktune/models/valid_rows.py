"""How many labels count, learnt without making the device idle.

The loss leaves ignored rows out before its products, but the host, which sizes those products, does not know how many rows
that is: prompts are often half of a batch, and the head's two products are 13% of a step (Llama-3.1-8B with 8 layers). Asking
when the loss is reached would wait for all layers. Asked before the first layer, the answer is there when they have all been
launched: the host then waits for the beginning of the same forward at most, and has the rest of it still queued.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class ValidRows:
    """The number of labels that are not `ignore_index`, on its way from where they are."""

    def __init__(self, labels: Tensor, ignore_index: int = -100) -> None:
        """labels [...], already shifted. While a CUDA graph or torch.compile records, there is nothing to know."""
        self._event: Any = None
        self._count: Tensor | None = None
        if torch.compiler.is_compiling() or isinstance(labels, FakeTensor) or labels.device.type not in ("cuda", "cpu"):
            return
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        count = (labels != ignore_index).sum()
        if not labels.is_cuda:
            self._count = count
            return
        self._count = torch.empty((), dtype=count.dtype, pin_memory=True)
        self._count.copy_(count, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(labels.device))

    def read(self) -> int | None:
        """The number, or None where it can't be known."""
        if self._event is not None:
            self._event.synchronize()
        return None if self._count is None else int(self._count)
