"""The 8-bit code of optimiser moments: its values, its thresholds, and blockwise quantisation in plain PyTorch.

Seven decades 10^-6 to 1; decade i is cut into 2^i equal cells (2^(i+1) without a sign), each stood for by its middle,
besides 0 and 1. A block of 256 consecutive elements keeps its largest magnitude, and a code for each element's share
of it: the nearest value's, or the even one of two equally near. A negative number never becomes 0, but the smallest
negative code, as in bitsandbytes' CUDA kernels (its CPU kernels let it vanish).

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", 2022.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparktune.ops.flat import BLOCK


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the codes in ascending order, fp32 [256]: those of bitsandbytes' create_dynamic_map."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-v for v in middles if signed]
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(map of m, map of v, thresholds of |m|, thresholds of v), fp32 on `device`.

    threshold[a] parts magnitude a (codes 127 + a and 127 - a of m, a of v) from a + 1: x above it belongs to a + 1. It
    is the middle of both, or the number below, where equally far x must go up to reach an even code.
    """
    made = [dynamic_map(True), dynamic_map(False)]
    for values, odd_wins in ((made[0][127:], True), (made[1], False)):
        middles = (values[:-1] + values[1:]) * 0.5
        up = torch.arange(len(middles)) % 2 == (0 if odd_wins else 1)
        made.append(torch.where(up, torch.nextafter(middles, torch.tensor(-1.0)), middles))
    return tuple(t.to(device) for t in made)  # type: ignore[return-value]


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes [n] uint8, absmax [blocks]) of x [n], in blocks of 256; plain PyTorch."""
    n = x.numel()
    blocks = torch.nn.functional.pad(x, (0, -n % BLOCK)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax[:, None]
    scaled = torch.where(scaled.isfinite(), scaled, 0.0)
    threshold = tables(x.device)[2 if signed else 3].to(x.dtype)
    count = torch.bucketize(scaled.abs(), threshold)
    if signed:
        count = torch.where(scaled < 0, 127 - count.clamp(1, 127), 127 + count)
    return count.to(torch.uint8).reshape(-1)[:n], absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Codes [n] and absmax [blocks] to values [n] in absmax's dtype; plain PyTorch."""
    values = tables(codes.device)[0 if signed else 1].to(absmax.dtype)
    return values[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]
