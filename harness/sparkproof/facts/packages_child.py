"""Calls what is built beside torch, on the GPU where torch has one, else on the CPU: `python -m
sparkproof.facts.packages_child` prints JSON lines.

Each is imported and called on a few numbers, since a library of the wrong CUDA version, architecture or torch imports
late or computes nothing. Packages that are not installed are passed over.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from sparkproof.facts.child import reason, relative, say

SIZE = 256  # rows and columns of the matrix that is quantised


def torchvision(torch: Any, device: str) -> None:
    """Two boxes that overlap and one apart: the second goes."""
    import torchvision as module

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    kept = module.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        raise ArithmeticError(f"nms kept {kept} of three boxes instead of [0, 2]")


def flash_attn(torch: Any, device: str) -> None:
    """Causal attention against torch's own in float32."""
    from flash_attn import flash_attn_func

    q, k, v = (torch.randn(1, 64, 2, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    got = flash_attn_func(q, k, v, causal=True).transpose(1, 2)
    near(got, attention(torch, q, k, v), 0.02)


def xformers(torch: Any, device: str) -> None:
    """memory_efficient_attention, forward and backward."""
    import xformers.ops as ops

    q, k, v = (torch.randn(1, 64, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    got = ops.memory_efficient_attention(q, k, v, attn_bias=ops.LowerTriangularMask())
    got.float().sum().backward()
    near(got.transpose(1, 2), attention(torch, q, k, v), 0.02)
    if not bool(torch.isfinite(q.grad).all()):
        raise ArithmeticError("the gradient is not finite")


def causal_conv1d(torch: Any, device: str) -> None:
    """A causal depthwise convolution against torch's."""
    from causal_conv1d import causal_conv1d_fn

    x, w = torch.randn(1, 8, 32, device=device), torch.randn(8, 4, device=device)
    want = torch.nn.functional.conv1d(x, w.unsqueeze(1), padding=3, groups=8)[..., :32]
    near(causal_conv1d_fn(x, w), want, 1e-3)


def mamba_ssm(torch: Any, device: str) -> None:
    """A selective scan with A = 0 and dt = 1 sums its input over time."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, one = torch.randn(1, 8, 16, device=device), torch.ones(1, 1, 16, device=device)
    a = torch.zeros(8, 1, device=device)
    near(selective_scan_fn(x, torch.ones_like(x), a, one, one), x.cumsum(-1), 1e-3)


def attention(torch: Any, q: Any, k: Any, v: Any) -> Any:
    """Causal attention in float32 by torch's plain path; [batch, length, heads, size] in, [batch, heads, ...] out."""
    q, k, v = (t.detach().float().cpu().transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def near(got: Any, want: Any, bound: float) -> None:
    """ArithmeticError unless the relative L2 distance is at most `bound`."""
    error = relative(got, want)
    if not error <= bound:
        raise ArithmeticError(f"off by {error:.3g}, relative; {bound} is allowed")


# distribution -> its call, and whether that needs a GPU
CALLS: dict[str, tuple[Callable[[Any, str], None], bool]] = {
    "torchvision": (torchvision, False),
    "flash-attn": (flash_attn, True),
    "xformers": (xformers, True),
    "causal-conv1d": (causal_conv1d, True),
    "mamba-ssm": (mamba_ssm, True),
}


def extensions(torch: Any, device: str) -> None:
    """Import and call each that is installed."""
    found: list[dict[str, Any]] = []
    for name, (call, needs_gpu) in CALLS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if needs_gpu and device == "cpu":
            continue
        say(stage=f"it called {name}")
        error = None
        try:
            call(torch, device)
        except Exception as e:
            error = reason(e)
        found.append({"name": name, "version": version, "error": error})
        say(extensions=found)


def four_bit(torch: Any, device: str) -> dict[str, Any]:
    """NF4 with double quantisation: a matrix and back, and a layer's product and gradient with it."""
    answer: dict[str, Any] = {"device": device}
    try:
        import bitsandbytes as bnb
        import bitsandbytes.functional as f

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SIZE, SIZE, generator=generator).bfloat16()
        packed, state = f.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
        back = f.dequantize_4bit(packed, state)
        answer["relative_error"] = round(relative(back, weight), 5)
        layer = bnb.nn.Linear4bit(
            SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
        layer = layer.to(device)
        answer["parameter"] = type(layer.weight).__name__
        answer["has_statistics"] = hasattr(layer.weight, "compress_statistics")
        x = torch.randn(8, SIZE, generator=generator).bfloat16().to(device).requires_grad_()
        y = layer(x)
        y.float().sum().backward()
        want = x.detach().double() @ back.double().t()
        want_grad = back.double().sum(0).expand(8, SIZE)
        answer["product_error"] = round(max(relative(y, want), relative(x.grad, want_grad)), 5)
    except Exception as e:
        answer["error"] = reason(e)
    return answer


def main() -> None:
    """Torch first, since all the others need it."""
    say(stage="it imported torch")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(stage="it called the packages beside torch")
    extensions(torch, device)
    if importlib.util.find_spec("bitsandbytes") is not None:
        say(stage="it quantised to 4 bits and back")
        # bitsandbytes hands its plain-torch fallbacks to torch.compile while it is imported, which loads Inductor: 4 of 6
        # seconds. What is tried here are its own libraries.
        vars(torch)["compile"] = lambda model=None, **options: (lambda f: f) if model is None else model
        say(four_bit=[four_bit(torch, device)])
    say(done=True)


if __name__ == "__main__":
    main()
