"""Activations in pinned host memory between a step's forward and backward, and the embedding's table there for good, for GPUs
that have memory of their own.

With full recompute what grows with depth is each layer's input, 2 bytes x hidden a token (1 GiB for 32 layers of
Llama-3.1-8B at 4096 tokens). Copies go on a stream of their own while layers compute: out from a layer's MLP to the next
one's, and back shortly before they are read. What of a layer can be copied in the time of a forward is free: with an H200's
55 GB/s and 780 TFLOP/s 39 KB a token of such a layer, which is all but gate and up. `HostStore` measures both,
`checkpointing.leaving` chooses. A device that shares the host's memory has nothing to gain, and is refused.

No memory is recorded for a second stream (`record_stream`), which a CUDA graph would then never use again: the layers' stream
waits for a copy before it lets go of what is copied, a layer later.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
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
    """Where layers put activations on one CUDA device. Errors: ValueError on a device that this can't help.

    `bytes_a_flop`: what can be copied out in the time of a flop in a bf16 product, measured when the store is made.
    """

    def __init__(self, device: torch.device) -> None:
        refuse(device, "activations", "offload")
        self.stream: Any = torch.cuda.Stream(device)
        self.bytes_a_flop = _bytes_a_flop(device)
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # pinned buffers by their bytes
        self._recorded: list[Tensor] = []
        self._leaving: list[tuple[Any, Sequence[Tensor]]] = []  # on their way out: when they are there, and they
        self._arriving: dict[int, tuple[Any, Sequence[Tensor]]] = {}
        self._last: weakref.ReferenceType[Stored] | None = None

    def begin(self) -> None:
        """A new forward: what is put next has nothing before it. Copies that nobody took are waited for."""
        self._last = None
        self.join()
        while self._arriving:
            torch.cuda.current_stream(self.stream.device).wait_event(self._arriving.popitem()[1][0])

    def put(self, tensors: Sequence[Tensor]) -> Stored:
        """Copy out what a layer's backward wants last, without waiting; all that was put before, by another layer, is out."""
        self.join()
        before = self._last() if self._last is not None else None
        stored = Stored(self, tensors, before)
        self._last = weakref.ref(stored)
        return stored

    def join(self) -> None:
        """The current stream goes on when what was put is out, and its memory is free."""
        if self._leaving:
            torch.cuda.current_stream(self.stream.device).wait_event(self._leaving[-1][0])
            self._leaving.clear()

    def lease(self) -> Lease:
        """Of the buffers that went into a graph since the last call, which nothing else gets while this lives."""
        held, self._recorded = self._recorded, []
        return Lease(self, held)

    def buffer(self, size: int) -> Tensor:
        """`size` pinned bytes. Whoever used them before did so on the store's stream, or on one that it waits for."""
        free = self._free[size]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def give_back(self, buffers: Sequence[Tensor]) -> None:
        """For later layers to use, or for none where a graph is being recorded that will use them."""
        if torch.cuda.is_current_stream_capturing():
            self._recorded += buffers
            return
        for b in buffers:
            self._free[b.numel()].append(b)

    def out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The bytes of these, on the host once the store's stream is there."""
        memory = [flat(t) for t in tensors]
        buffers = [self.buffer(t.numel()) for t in memory]
        if memory:
            self._copy(buffers, memory)
            self._leaving.append((self.stream.record_event(), memory))
        return buffers

    def back(self, buffers: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """(when they are there, bytes on the device)."""
        here = [torch.empty(b.shape, dtype=b.dtype, device=self.stream.device) for b in buffers]
        self._copy(here, buffers)
        found = (self.stream.record_event(), here)
        self._arriving[id(here)] = found
        return found

    def arrived(self, found: tuple[Any, list[Tensor]]) -> list[Tensor]:
        """What `back` returned, for the current stream."""
        event, here = self._arriving.pop(id(found[1]), found)
        torch.cuda.current_stream(self.stream.device).wait_event(event)
        return list(here)

    def _copy(self, to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for a, b in zip(to, of, strict=True):
                a.copy_(b, non_blocking=True)


class Lease:
    """Buffers of a store that a graph writes to, until this dies with it."""

    def __init__(self, store: HostStore, buffers: list[Tensor]) -> None:
        self._end = weakref.finalize(self, store.give_back, buffers)


class Stored:
    """What one layer put, on the host, on its way there or back.

    Its backward takes `first` what was put last, which has set out before, and then the `rest`, which sets out now and is there
    when it is wanted: what another layer put before sets out no earlier, so that only one layer's lies on the device where most
    is in use.
    """

    def __init__(self, store: HostStore, rest: Sequence[Tensor], before: Stored | None) -> None:
        self._store, self._before = store, before
        self._first, self._rest = Lot(store, []), Lot(store, rest)

    def put_first(self, tensors: Sequence[Tensor]) -> None:
        """Copy out what the backward begins with, without waiting."""
        self._first = Lot(self._store, tensors)

    def first(self) -> list[Tensor]:
        """The first of the tensors, for the current stream, strides as they were."""
        self._first.fetch()
        self._rest.fetch()
        return self._first.take()

    def rest(self) -> list[Tensor]:
        """The others; what was put before sets out. None, a second time."""
        found = self._rest.take()
        if self._before is not None:
            self._before._first.fetch()
            self._before = None
        return found


class Lot:
    """Tensors that go and come back together."""

    def __init__(self, store: HostStore, tensors: Sequence[Tensor]) -> None:
        self._store, self._like, self._buffers = store, [place(t) for t in tensors], store.out(tensors)
        self._here: tuple[Any, list[Tensor]] | None = None

    def fetch(self) -> None:
        """Begin the copies back, once."""
        if self._here is None and self._buffers:
            self._here = self._store.back(self._buffers)

    def take(self) -> list[Tensor]:
        """The tensors, once."""
        if self._here is None:
            return []
        here, self._here = self._store.arrived(self._here), None
        self._store.give_back(self._buffers)
        self._buffers = []
        return [placed(b, like) for b, like in zip(here, self._like, strict=True)]

    def __del__(self) -> None:
        if self._buffers:  # never taken
            self._store.give_back(self._buffers)


Place = tuple[torch.dtype, int, torch.Size, tuple[int, ...]]


def place(t: Tensor) -> Place:
    """(dtype, offset, shape, strides) of a tensor in what `flat` makes of it."""
    if _whole(t):
        return t.dtype, int(t.storage_offset()), t.shape, t.stride()
    return t.dtype, 0, t.shape, torch.empty(t.shape, device="meta").stride()


def flat(t: Tensor) -> Tensor:
    """A tensor's memory as bytes: its storage, with the room in its rows, or of a small part of one a copy."""
    storage = t.untyped_storage() if _whole(t) else t.contiguous().untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)


def placed(memory: Tensor, at: Place) -> Tensor:
    """The tensor whose `place` is `at`, over bytes as `flat` returned them."""
    dtype, offset, shape, strides = at
    return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage(), offset, shape, strides)


def _whole(t: Tensor) -> bool:
    return t.untyped_storage().nbytes() <= 2 * t.nbytes  # rows of a tiny model have as much room as width


def _bytes_a_flop(device: torch.device) -> float:
    """Bytes to the host in the time of a flop: 64 MiB against products of 4096 in bf16, both as they run here now."""
    n, size = 4096, 64 * 2**20
    here, there = (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
    )
    x, y = (torch.empty(n, n, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    copy_ms = _once_ms(lambda: there.copy_(here, non_blocking=True), 4)
    return (size / copy_ms) / (2.0 * n**3 / _once_ms(lambda: torch.mm(x, x, out=y), 20))


def _once_ms(work: Callable[[], Any], calls: int) -> float:
    """Milliseconds of a call, in a row of them after another."""
    for _ in range(2):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            work()
        last.record()
        last.synchronize()
    return float(first.elapsed_time(last)) / calls
