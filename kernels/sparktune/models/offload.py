"""Layer inputs in pinned host memory between a step's forward and backward, for GPUs that have memory of their own.

With full recompute what grows with depth is each layer's input, 2 bytes x hidden a token (1 GiB for 32 layers of
Llama-3.1-8B at 4096 tokens). Copies go on a stream of their own while layers compute: out when a layer begins, and back
while the layer after it runs its backward. A device that shares the host's memory has nothing to gain, and is refused.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class HostStore:
    """Where layers put their inputs on one CUDA device. Errors: ValueError on a device that this can't help."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"layer inputs can be kept in host memory for a GPU only, not for {device.type}")
        if torch.cuda.get_device_properties(device).is_integrated:
            raise ValueError(
                "this GPU shares the host's memory, so keeping layer inputs there frees nothing: leave offload=False."
            )
        self.stream: Any = torch.cuda.Stream(device)
        self._last: weakref.ReferenceType[Stored] | None = None

    def begin(self) -> None:
        """A new forward: what is put next has nothing before it."""
        self._last = None

    def put(self, x: Tensor) -> Stored:
        """Copy x out without waiting."""
        before = self._last() if self._last is not None else None
        stored = Stored(self.stream, x, before)
        self._last = weakref.ref(stored)
        return stored


class Stored:
    """One input on the host, on its way there or back."""

    def __init__(self, stream: Any, x: Tensor, before: Stored | None) -> None:
        self._stream, self._before, self._device = stream, before, x.device
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is nobody else's until the copy is done
        self._here: Tensor | None = None

    def fetch(self) -> None:
        """Begin the copy back, once."""
        if self._here is None:
            with torch.cuda.stream(self._stream):
                self._here = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
                self._here.copy_(self._host, non_blocking=True)

    def take(self) -> Tensor:
        """The input, for the current stream; what was put before it sets out."""
        self.fetch()
        here, self._here = self._here, None
        assert here is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        here.record_stream(current)
        if self._before is not None:
            self._before.fetch()
            self._before = None
        return here
