"""Which Triton kernels ran in this process, counted at the launch itself: what an engine proves its kernels by.

A patched class or an installed package is a claim. A launch is none: every `kernel[grid](...)` goes through
`JITFunction.run`, and code that torch.compile made through its `CachingAutotuner.run`. Both are wrapped once a process, which
costs about a microsecond a launch; `Launches` says how many there were since it began, by the module that defines the kernel.

A kernel of an engine that is part of a compiled layer (Unsloth compiles each of its layers whole) is started by torch.compile
from a copy that has no module, but the kernel's own name: it counts for the module of the engine's that holds a kernel so named.
What torch.compile wrote itself begins with "triton_" and has no other name to go by.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from typing import Any

ENGINES = ("liger_kernel", "unsloth", "unsloth_zoo", "sparktune")  # packages with kernels of their own
COMPILED = "torch.compile"  # the name under which what inductor made is counted
WRITTEN = "triton_"  # how the kernels begin that torch.compile wrote
_lock = threading.Lock()
_counts: Counter[tuple[str, str]] = Counter()  # (module, how it was started)
_watching: list[str] = []


def watch() -> None:
    """Count every launch of this process from now on; a second call changes nothing."""
    with _lock:
        if _watching:
            return
        with contextlib.suppress(ImportError):  # without Triton nothing is launched
            from triton.runtime.jit import JITFunction

            _wrap(JITFunction, lambda kernel: (str(kernel.fn.__module__), "triton"))
        with contextlib.suppress(ImportError):  # nor compiled without inductor
            from torch._inductor.runtime.triton_heuristics import CachingAutotuner

            _wrap(CachingAutotuner, lambda kernel: (_home(kernel.fn.__name__), "compiled"))
        _watching.append("on")


@functools.cache
def _home(kernel: str) -> str:
    """The module of an engine's that has a Triton kernel of this name, for one that torch.compile starts; else `COMPILED`."""
    from triton.runtime.jit import KernelInterface

    if kernel.startswith(WRITTEN):
        return COMPILED
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ENGINES and isinstance(vars(module).get(kernel), KernelInterface):
            return str(getattr(getattr(vars(module)[kernel], "fn", None), "__module__", name))
    return COMPILED


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
        found: Counter[str] = Counter()
        for (module, _), n in self._since().items():
            found[module] += n
        return dict(sorted(found.items()))

    def _since(self) -> Counter[tuple[str, str]]:
        with _lock:
            return _counts - self._before

    def of(self, package: str) -> dict[str, dict[str, int]]:
        """Last part of a module's name -> {"triton": launches, "compiled": those within what torch.compile made}, of one
        package; and `COMPILED` -> launches of what torch.compile wrote itself."""
        found: dict[str, dict[str, int]] = {}
        for (module, way), n in sorted(self._since().items()):
            if module in (COMPILED, package) or module.startswith(f"{package}."):
                kept = found.setdefault(module if module == COMPILED else module.rsplit(".", 1)[-1], {})
                kept[way] = kept.get(way, 0) + n
        return found

    def foreign(self) -> dict[str, dict[str, int]]:
        """Module -> {"triton": launches} of every engine's package: nothing, in a process that runs plain PyTorch."""
        mine = self.by_module().items()
        return {module: {"triton": n} for module, n in mine if module.split(".")[0] in ENGINES}
