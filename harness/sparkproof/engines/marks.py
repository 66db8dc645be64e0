"""Which Triton kernels ran in this process, counted at the launch itself: what an engine proves its kernels by.

A patched class or an installed package is a claim. A launch is none: every `kernel[grid](...)` goes through
`JITFunction.run`, and code that torch.compile made through its `CachingAutotuner.run`. Both are wrapped once a process, which
costs about a microsecond a launch; `Launches` says how many there were since it began, by the module that defines the kernel.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from typing import Any

ENGINES = ("liger_kernel", "unsloth", "unsloth_zoo", "sparktune")  # packages with kernels of their own
COMPILED = "torch.compile"  # the name under which what inductor made is counted
_lock = threading.Lock()
_counts: Counter[str] = Counter()
_watching: list[str] = []


def watch() -> None:
    """Count every launch of this process from now on; a second call changes nothing."""
    with _lock:
        if _watching:
            return
        with contextlib.suppress(ImportError):  # without Triton nothing is launched
            from triton.runtime.jit import JITFunction

            _wrap(JITFunction, lambda kernel: str(kernel.fn.__module__))
        with contextlib.suppress(ImportError):  # nor compiled without inductor
            from torch._inductor.runtime.triton_heuristics import CachingAutotuner

            _wrap(CachingAutotuner, lambda kernel: COMPILED)
        _watching.append("on")


def _wrap(owner: Any, name: Any) -> None:
    run = owner.run

    @functools.wraps(run)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        if not kwargs.get("warmup"):  # compiles, and launches nothing
            with _lock:
                _counts[name(self)] += 1
        return result

    owner.run = counted


class Launches:
    """Launches since this was made, or since `reset`."""

    def __init__(self) -> None:
        watch()
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        with _lock:
            self._before = Counter(_counts)

    def by_module(self) -> dict[str, int]:
        """Module that defines the kernel -> launches."""
        with _lock:
            return dict(sorted((_counts - self._before).items()))

    def of(self, package: str) -> dict[str, dict[str, int]]:
        """Last part of a module's name -> {"triton": launches}, of one package and of what torch.compile made."""
        found: dict[str, dict[str, int]] = {}
        for module, n in self.by_module().items():
            if module == COMPILED:
                found[COMPILED] = {"compiled": n}
            elif module == package or module.startswith(f"{package}."):
                kept = found.setdefault(module.rsplit(".", 1)[-1], {"triton": 0})
                kept["triton"] += n
        return found

    def foreign(self) -> dict[str, dict[str, int]]:
        """Module -> {"triton": launches} of every engine's package: nothing, in a process that runs plain PyTorch."""
        mine = self.by_module().items()
        return {module: {"triton": n} for module, n in mine if module.split(".")[0] in ENGINES}
