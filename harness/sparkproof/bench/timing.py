"""Milliseconds of GPU time a call, without the time its launches take on the CPU.

Many calls over input sets that together exceed L2 several times are captured in one CUDA graph; a sample replays it.
Where something can't be captured the calls are timed between two events instead, launches and all, and the row says so.
Everything runs on one side stream, current for the whole process: autograd runs a backward on its forward's stream, and
a capture sees its own stream alone.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sparkproof.measure.gpu_time import gpu_ms

TARGET_MS = 10.0  # a sample
MOST_CALLS = 128  # in one graph; a short one is replayed more often
EAGER_CALLS = 10
SLOW_CALL = 0.005  # seconds; a call that takes longer is tried less often before it is timed
Run = Callable[[int], Any]


class Timer(Protocol):
    """One engine's calls, ready to be timed."""

    method: str
    reason: str
    call_us: float

    def sample(self) -> float:
        """Milliseconds a call."""

    def free(self) -> None:
        """Give its memory back."""


class Clock(Protocol):
    """What makes timers: a GPU's, or a test's."""

    def timer(self, run: Run, sets: int, why_not: str = "") -> Timer:
        """Warm up `run(i)` and make its timer; it uses `sets` sets of inputs in turn. `why_not`: no capture, call by call."""

    def copy(self, size: int) -> dict[str, tuple[Run, int]]:
        """Ways of copying that read and write `size` bytes in all: name -> (run, sets)."""

    def sets(self, touched: int) -> int:
        """How many sets of `touched` bytes it takes so that none is found in L2."""


@dataclass
class Replay:
    """A captured graph, or the calls themselves where that failed."""

    run: Run | None
    calls: int
    graph: Any = None
    replays: int = 1
    method: str = "graph"
    reason: str = ""
    call_us: float = 0.0

    def sample(self) -> float:
        """Milliseconds a call."""
        return gpu_ms(torch, self._batch) / (self.calls * self.replays)

    def _batch(self) -> None:
        if self.graph is not None:
            for _ in range(self.replays):
                self.graph.replay()
        elif self.run is not None:
            for i in range(self.calls):
                self.run(i)

    def free(self) -> None:
        """Drop the graph, its memory and the call."""
        self.graph = self.run = None


@dataclass
class GpuClock:
    """The current CUDA device."""

    device: torch.device
    l2_bytes: int
    stream: Any = field(default=None)

    def __post_init__(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        torch.cuda.set_stream(self.stream)

    def sets(self, touched: int) -> int:
        """Enough to touch four times L2 before one comes again."""
        return max(1, math.ceil(4 * self.l2_bytes / max(1, touched)))

    def copy(self, size: int) -> dict[str, tuple[Run, int]]:
        """The driver's copy, and an elementwise kernel's, which the faster one is depends on the size."""
        half, count = max(16, size // 2 // 16 * 16), self.sets(size)
        # Never the default generator: a capture that failed leaves it unusable.
        g = torch.Generator(self.device)
        pairs = [
            [torch.empty(half // 4, dtype=torch.int32, device=self.device).random_(generator=g) for _ in range(2)]
            for _ in range(count)
        ]

        def driver(i: int) -> None:
            source, target = pairs[i % count]
            target.copy_(source)

        def kernel(i: int) -> None:
            source, target = pairs[i % count]
            torch.neg(source, out=target)

        return {"copy by the driver": (driver, count), "copy by a kernel": (kernel, count)}

    def timer(self, run: Run, sets: int, why_not: str = "") -> Replay:
        """Capture as many calls as a sample takes."""
        for i in range(2):
            run(i)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(2)
        torch.cuda.synchronize()
        eager = EAGER_CALLS if time.perf_counter() - start < SLOW_CALL else 2
        start = time.perf_counter()
        for i in range(eager):
            run(i)
        call_us = 1e6 * (time.perf_counter() - start) / eager
        torch.cuda.synchronize()
        estimate = 1e3 * (time.perf_counter() - start) / eager
        calls = min(MOST_CALLS, max(sets, math.ceil(TARGET_MS / max(1e-3, estimate))))
        calls = max(sets, calls // sets * sets)
        if why_not:
            return Replay(run, max(1, math.ceil(TARGET_MS / estimate)), None, 1, "events", why_not, call_us)
        try:
            graph = self._capture(run, calls, sets)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as e:
            torch.cuda.synchronize()
            reason = f"not captured: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:160]}"
            return Replay(run, max(1, math.ceil(TARGET_MS / estimate)), None, 1, "events", reason, call_us)
        found = Replay(run, calls, graph, 1, "graph", "", call_us)
        found.sample()
        once = found.sample() * calls
        found.replays = max(1, math.ceil(TARGET_MS / max(1e-3, once)))
        return found

    def _capture(self, run: Run, calls: int, sets: int) -> Any:
        """One graph. By hand: `torch.cuda.graph` also collects garbage and empties the cache, which takes longer than it all.

        The results of as many calls as there are sets stay until others are made, so that what a call writes is not
        found in L2 either: a result that is dropped at once has its memory written again by the next call.
        """
        graph = torch.cuda.CUDAGraph()
        kept: deque[Any] = deque(maxlen=sets)
        torch.cuda.synchronize()
        gc.disable()  # what is collected meanwhile may synchronise, which ends a capture
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(calls):
                    kept.append(run(i))
            except BaseException:
                with suppress(Exception):
                    graph.capture_end()
                raise
            kept.clear()
            graph.capture_end()
        finally:
            gc.enable()
        return graph


def free_memory() -> None:
    """Collect what a row left, and hand it back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
