"""Layer inputs in pinned host memory between a step's forward and backward, and the embedding's table there for good, for GPUs
that have memory of their own.

With full recompute what grows with depth is each layer's input, 2 bytes x hidden a token (1 GiB for 32 layers of
Llama-3.1-8B at 4096 tokens). Copies go on a stream of their own while layers compute: out when a layer begins, and back
while the layer after it runs its backward. A device that shares the host's memory has nothing to gain, and is refused.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


def refuse(device: torch.device, what: str, option: str) -> None:
    """Errors: ValueError on a device for which keeping `what` in host memory frees nothing."""
    if device.type != "cuda":
        raise ValueError(f"{what} can be kept in host memory for a GPU only, not for {device.type}")
    if torch.cuda.get_device_properties(device).is_integrated:
        raise ValueError(
            f"this GPU shares the host's memory, so keeping {what} there frees nothing: leave {option}=False."
        )


def embedding_to_host(model: Any) -> None:
    """Move the table of a model's input embedding into pinned host memory, where the device reads what a batch looks up.

    The table stays a tensor of the CUDA device for everybody who asks, at an address that both sides can read: a lookup of
    4096 rows of 8 KB is 34 MB over PCIe, and 1.05 GB (Llama-3.1-8B) is free for activations. Errors: ValueError where it frees
    nothing, where the head is tied to it (which would read all of it in every product), or where it is trained.
    """
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    refuse(weight.device, "the embedding", "offload_embedding")
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is weight:
        raise ValueError(
            "the head is tied to the embedding and reads all of it in every step: leave offload_embedding=False."
        )
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
    host.copy_(weight.detach())
    embedding.weight = nn.Parameter(_seen_from(host, weight.device), requires_grad=False)


class _Mapped:
    """Pinned host memory as the CUDA array interface describes it; lives as long as a tensor over it."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel() * host.element_size(),), "typestr": "|u1", "data": (host.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _seen_from(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of `device` over pinned host memory, which CUDA maps at one address for both sides."""
    return torch.as_tensor(_Mapped(host), device=device).view(host.dtype).view(host.shape)


class HostStore:
    """Where layers put their inputs on one CUDA device. Errors: ValueError on a device that this can't help."""

    def __init__(self, device: torch.device) -> None:
        refuse(device, "layer inputs", "offload")
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
