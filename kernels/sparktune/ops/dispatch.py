"""Which way an op ran, decided in one place and counted, so that nobody mistakes a fallback for a kernel.

CUDA tensors run the Triton kernel and nothing else: what fails there raises. CPU tensors run the same kernel in
Triton's interpreter when the process was started with TRITON_INTERPRET=1, and the plain PyTorch reference otherwise.
`watermarks()` says how often each way was taken: `{"rms_norm": {"triton": 12, "interpreter": 0, "reference": 0}}`.
"""

from __future__ import annotations

import threading
from typing import Any, Literal, NoReturn

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from sparktune.ops.launching import start

Way = Literal["triton", "interpreter", "reference"]
WAYS: tuple[Way, ...] = ("triton", "interpreter", "reference")
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # decided when kernels are decorated, so fixed for the process

_lock = threading.Lock()
_counts: dict[str, dict[Way, int]] = {}
_launches: dict[str, int] = {}


def watermarks() -> dict[str, dict[Way, int]]:
    """Op -> how often each way was taken since the last `reset()`; a copy."""
    with _lock:
        return {op: dict(ways) for op, ways in _counts.items()}


def launches() -> dict[str, int]:
    """Kernel -> how often it was launched since the last `reset()`, counted at the launch itself; a copy.

    Names are module and function, such as "sparktune.ops.swiglu.forward_kernel". A call of an empty tensor launches
    nothing.
    """
    with _lock:
        return dict(_launches)


def reset() -> None:
    """Forget all counts."""
    with _lock:
        _counts.clear()
        _launches.clear()


def record(op: str, way: Way) -> None:
    """Count one call of `op`; ops call this after the work was done or launched without an error."""
    with _lock:
        ways = _counts.get(op)
        if ways is None:
            ways = _counts[op] = dict.fromkeys(WAYS, 0)
        ways[way] += 1


def route(op: str, *tensors: torch.Tensor) -> Way:
    """The way these tensors take. Errors: ValueError when they lie on different devices or an unknown kind of one."""
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    kind = tensors[0].device.type
    if kind == "cuda":
        if INTERPRETED:
            raise RuntimeError(f"{op}: TRITON_INTERPRET is set, so CUDA tensors would not run the kernel; unset it")
        return "triton"
    if kind == "cpu":
        return "interpreter" if INTERPRETED else "reference"
    if kind == "meta":
        return "reference"
    raise ValueError(f"{op}: tensors must be on a CUDA device or the CPU, got {kind}")


def kernels_run_on(tensor: torch.Tensor) -> bool:
    """Whether ops run their kernels on this tensor's device, compiled or interpreted, and not their references."""
    return tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu")


def stream_of(device: torch.device) -> int:
    """The handle of the stream that is current on a CUDA device; 0 on any other."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast wants matrix products in on this tensor's device; None outside autocast."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def launch(
    kernel: Any, programs: int | tuple[int, ...], tensor: torch.Tensor, *args: Any, fp_fusion: bool = False, **options: Any
) -> None:  # fmt: skip
    """Run `programs` programs of a Triton kernel on the device and stream current for `tensor`; nothing on a fake tensor.

    Fused multiply-add is off unless asked for: the plain PyTorch ops that a kernel stands for round after every step,
    and results that are promised bit for bit must do so too. Most kernels here wait for memory, not for arithmetic.
    """
    if isinstance(tensor, FakeTensor):
        return
    name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"  # the same compiled and interpreted
    grid = programs if isinstance(programs, tuple) else (programs,)
    if tensor.is_cuda:
        device, options = tensor.device.index, {**options, "enable_fp_fusion": fp_fusion}
        if device == torch.cuda.current_device():
            start(kernel, grid, device, args, options)
        else:
            with torch.cuda.device(device):
                start(kernel, grid, device, args, options)
    else:
        kernel[grid](*args, **options)
    with _lock:
        _launches[name] = _launches.get(name, 0) + 1


def rows(t: torch.Tensor) -> torch.Tensor:
    """`t` [..., N], not empty, as [M, N] with unit stride along N: a view where strides allow, else a copy."""
    n = t.shape[-1]
    try:
        flat = t.view(-1, n)
    except RuntimeError:
        flat = t.reshape(-1, n)
    return flat if n == 1 or flat.stride(1) == 1 else flat.contiguous()


def no_double_backward(op: str) -> None:
    """Raise inside a backward that runs with `create_graph=True`: a kernel's gradient is not itself differentiable."""
    if torch.is_grad_enabled():
        _refuse_double_backward(op)


def _refuse_double_backward(op: str) -> NoReturn:
    raise RuntimeError(
        f"{op} has no second derivative: its backward is a fused kernel. Drop create_graph=True, or call "
        f"sparktune.ops.{op}.reference, which plain autograd differentiates as often as you like."
    )
