"""Starting a compiled kernel again without asking Triton which one it is.

`kernel[grid](...)` works out at every call what its arguments compile to: some 60 us of Python for 25 arguments, against 20 us
that many of our kernels run. A step of 8 layers starts 400, so that the host, not the device, set the pace of the forward.
Here the compiled kernel of the first call is kept under a key that says at least as much as Triton's own: for tensors the dtype
and whether the address is a multiple of 16, for floats their type, for all else type and value.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

# An integer that changes at each call (a seed, say) makes an entry a call. Then all are forgotten now and then, and looked up
# anew: slow for one call each, and never wrong.
MOST = 4096
_lock = threading.Lock()
_kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def start(
    kernel: Any, grid: tuple[int, ...], device: int | None, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Run `kernel`, a `triton.jit` function, on the current device, which `device` numbers, and its current stream.

    `args` are its arguments by position, `options` those by name (constants) and Triton's own (num_warps ...).
    """
    described: list[Any] = [id(kernel), device]
    for a in args:
        if isinstance(a, Tensor):
            described.append(a.dtype)
            described.append(a.data_ptr() % 16 == 0)
        else:
            described.append(type(a))
            if not isinstance(a, float):
                described.append(a)
    for name, value in options.items():
        described += (name, type(value), value)
    key = tuple(described)
    found = _kept.get(key)
    if found is None:
        compiled = kernel[grid](*args, **options)
        names = kernel.arg_names[len(args) :]
        constants = tuple(options[n] for n in names if n in options)
        # A default, or an argument given by name out of order, is Triton's to place; then nothing is kept.
        if compiled is not None and len(constants) == len(names):
            with _lock:
                if len(_kept) >= MOST:
                    _kept.clear()
                _kept[key] = compiled, (kernel, constants)  # the kernel too: its id must stay its own
        return
    compiled, (_, constants) = found
    compiled[grid + (1,) * (3 - len(grid))](*args, *constants)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels too, and takes the host 4 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is n or more; 1 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 1
