r"""Nested ("double") quantisation: the fp32 scales of 4-bit blocks in 8 bits, with bitsandbytes' codes.

    offset = mean of all scales
    a2     = max |scale - offset|          one for each block of B2 scales (256), fp32
    z      = (scale - offset) (1 / a2)     1 / a2 is the GPU's approximate reciprocal, as in bitsandbytes
    code   = the entry of CODE8 nearest to z; the even one of two equally near

CODE8 has 256 ascending fp32 values, such as `dynamic_map.dynamic_map(signed=True)`. With m_i the middle of entries i and
i + 1, rounded to fp32, the code is the number of i with z > m_i, or z = m_i where i is odd. A block of scales that
all equal the offset, or with a NaN, has codes 0: no z is above anything there. bitsandbytes' CPU code takes other
entries, up to 4 away, in 3% of all cases; this follows its CUDA code.

Shapes: scales fp32 [n] -> codes uint8 [n], a2 fp32 [ceil(n / B2)], offset fp32 [1]. No gradient. The host waits for
nothing.

Bytes: reads 4n for the mean and 4n again, writes n and 4n/B2. A weight has one scale for 64 elements.

Source: Dettmers et al., "QLoRA", 2023, section 3; Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
2022, for the table. The rule for ties follows from the binary search in bitsandbytes 0.50.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.dequantize_4bit import Nested
from sparktune.ops.device import DeviceProperties
from sparktune.ops.dynamic_map import dynamic_map
from sparktune.ops.fused import Fused
from sparktune.ops.launching import cdiv
from sparktune.ops.numerics import reciprocal
from sparktune.ops.spec import FLOATS, Input, Launch, Law, Mutant, OpSpec, Outputs, Peer, Problem, Tensors

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def thresholds(code: Tensor) -> Tensor:
    """[255]: a value above the i-th belongs to entry i + 1 or a later one."""
    middle = (code[:-1] + code[1:]) * 0.5
    odd = torch.arange(255, device=code.device) % 2 == 1
    return torch.where(odd, torch.nextafter(middle, torch.full_like(middle, -2.0)), middle)


def reference(absmax: Tensor, code: Tensor, per_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: (codes, a2, offset); codes on a GPU but for the last bit of its reciprocal."""
    n = absmax.numel()
    offset = absmax.mean().reshape(1).clone()
    rows = torch.nn.functional.pad(absmax - offset, (0, -n % per_scale)).view(-1, per_scale)
    outer = rows.abs().amax(1) if n else rows.new_zeros(0)
    inverse = 1.0 / torch.where(outer > 0, outer, 1.0)
    z = torch.where(outer[:, None] > 0, rows * inverse[:, None], float("nan")).reshape(-1)[:n]
    return torch.bucketize(torch.where(z.isnan(), -2.0, z), thresholds(code)).to(torch.uint8), outer, offset


@triton.jit
def scales_kernel(absmax_ptr, offset_ptr, threshold_ptr, codes_ptr, outer_ptr, n, PER_SCALE: tl.constexpr):
    """One block of PER_SCALE scales a program."""
    first = tl.program_id(0).to(tl.int64) * PER_SCALE
    i = tl.arange(0, PER_SCALE)
    present = i < n - first
    x = tl.where(present, tl.load(absmax_ptr + first + i, mask=present, other=0.0) - tl.load(offset_ptr), 0.0)
    a2 = tl.max(tl.abs(x), 0)
    a2 = tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), a2)  # tl.max drops NaN
    z = tl.where(a2 > 0, x * reciprocal(tl.where(a2 > 0, a2, 1.0)), -2.0)
    rank = tl.zeros((PER_SCALE,), tl.int32)
    for bit in tl.static_range(8):
        rank += tl.where(z > tl.load(threshold_ptr + rank + ((128 >> bit) - 1)), 128 >> bit, 0)
    tl.store(codes_ptr + first + i, rank.to(tl.uint8), mask=present)
    tl.store(outer_ptr + tl.program_id(0), a2)


def _forward(absmax: Tensor, code: Tensor, per_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    offset = absmax.mean().reshape(1)  # bitsandbytes' sum, so its bits
    codes = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    outer = torch.empty(cdiv(n, per_scale), dtype=torch.float32, device=absmax.device)
    if n:
        dispatch.launch(
            scales_kernel, cdiv(n, per_scale), absmax, absmax.contiguous(), offset, thresholds(code), codes,
            outer, n, PER_SCALE=per_scale, num_warps=4,
        )  # fmt: skip
    return codes, outer, offset


_OP = Fused("quantize_scales", _forward, reference=reference, outputs=3)


def quantize_scales(absmax: Tensor, code: Tensor | None = None, per_scale: int = 256) -> tuple[Tensor, Nested]:
    """Scales fp32 [blocks] in 8 bits: (codes uint8 [blocks], what turns them back). No gradient.

    `code` [256] fp32 ascending is the table, bitsandbytes' dynamic map unless given. Errors: ValueError for scales or a
    table of another kind, or a blocksize bitsandbytes does not offer.
    """
    if absmax.dim() != 1 or absmax.dtype != torch.float32:
        raise ValueError(f"quantize_scales: absmax must be fp32 [blocks], got {absmax.dtype} {list(absmax.shape)}")
    code = dynamic_map(signed=True).to(absmax.device) if code is None else code
    if code.shape != (256,) or code.dtype != torch.float32:
        raise ValueError(f"quantize_scales: code must be fp32 [256], got {code.dtype} {list(code.shape)}")
    if per_scale not in BLOCKSIZES:
        raise ValueError(
            f"quantize_scales: per_scale must be one of {', '.join(map(str, BLOCKSIZES))}, got {per_scale}"
        )
    codes, outer, offset = _OP(absmax.detach(), code, per_scale)
    return codes, Nested(outer, code, offset, per_scale)


def _inputs(p: Problem) -> dict[str, Input]:
    table = Input((256,), torch.float32, "constant", make=lambda g: dynamic_map(signed=True))
    return {"absmax": Input((p.dims["rows"],), torch.float32, positive=True), "code": table}


def _named(found: tuple[Tensor, Tensor, Tensor]) -> Tensors:
    return dict(zip(("codes", "absmax2", "offset"), found, strict=True))


def _call(t: Tensors, p: Problem) -> Outputs:
    codes, nested = quantize_scales(t["absmax"], t["code"], p.dims["blocksize"])
    return _named((codes, nested.absmax, nested.offset))


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Outputs:
    found = reference(t["absmax"].float(), t["code"].float(), p.dims["blocksize"])
    return {k: f.to(compute) if compute and f.is_floating_point() else f for k, f in _named(found).items()}


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Outputs, Outputs]:
    found = _named(reference(t["absmax"], t["code"], p.dims["blocksize"]))
    floats = {k: f for k, f in found.items() if f.is_floating_point()}
    return floats, floats


def _bitsandbytes(t: Tensors, p: Problem) -> Outputs:
    from bitsandbytes import functional

    off = t["absmax"] - t["absmax"].mean()
    codes, state = functional.quantize_blockwise(off, code=t["code"], blocksize=p.dims["blocksize"])
    return {"absmax2": state.absmax} | ({"codes": codes} if codes.is_cuda else {})


def _shifted(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    """Codes do not depend on a power of two."""
    return call(t, p).float(), call({**t, "absmax": t["absmax"] * 4}, p).float()


def _ties(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    """Middles of a table of 128ths, whose sum, and so whose offset, is 0 without an error: each takes the even entry."""
    i = torch.arange(255, device=t["code"].device)
    ends = torch.tensor([-1.0, 1.0, 127.5 / 128], device=i.device)
    scales = torch.cat(((i - 127.5) / 128, ends))
    table = (torch.arange(256, device=i.device) - 128) / 128
    want = torch.cat((i + i % 2, torch.tensor([0, 255, 255], device=i.device)))
    p = replace(p, dims={**p.dims, "rows": 258, "blocksize": 512})
    return call({"absmax": scales, "code": table}, p).float(), want.float()


def _launches(p: DeviceProperties) -> list[Launch]:
    pointers = ("absmax_ptr", "offset_ptr", "threshold_ptr", "codes_ptr", "outer_ptr")
    args = {k: "*u8" if k == "codes_ptr" else "*fp32" for k in pointers} | {"n": "i32", "PER_SCALE": "constexpr"}
    return [Launch(f"{b} a block", "scales_kernel", args, {"PER_SCALE": b}, 4, 3, "fp32") for b in (64, 256, 4096)]


MUTANTS = Mutant.table(
    """no-offset: scales quantised with their mean in
- mask=present, other=0.0) - tl.load(offset_ptr), 0.0)
+ mask=present, other=0.0), 0.0)
padding-counts: the room after the last scale taken for scales of zero
- x = tl.where(present, tl.load(absmax_ptr + first + i, mask=present, other=0.0) - tl.load(offset_ptr), 0.0)
+ x = tl.load(absmax_ptr + first + i, mask=present, other=0.0) - tl.load(offset_ptr)
signed-max: the largest value in place of the largest magnitude
- tl.max(tl.abs(x), 0)
+ tl.max(x, 0)
nan-dropped: a block with a NaN quantised as if it had none
- > 0, float("nan"), a2)
+ > 1, float("nan"), a2)
inverse-lost: values not scaled before the search
- x * reciprocal(tl.where(a2 > 0, a2, 1.0))
+ x
ties-down: a value between two entries given to the lower throughout
- torch.where(odd, torch.nextafter(middle, torch.full_like(middle, -2.0)), middle)
+ middle
entries-for-middles: the entry at or below a value, not the nearest
- (code[:-1] + code[1:]) * 0.5
+ code[1:] * 1.0
one-step-less: the search stopped one step early
- tl.static_range(8)
+ tl.static_range(7)
first-outer: every outer scale written over the first
- outer_ptr + tl.program_id(0), a2
+ outer_ptr, a2
tail-unwritten: the last, shorter block left out
- scales_kernel, cdiv(n, per_scale), absmax
+ scales_kernel, max(1, n // per_scale), absmax
memory-order: scales taken in the order of memory
- absmax.contiguous(), offset
+ absmax.as_strided((n,), (1,)), offset
silent-fallback: the reference run in place of the kernel
- codes, outer, offset = _OP(absmax.detach(),
+ codes, outer, offset = reference(absmax.detach(),
"""
)

OP = OpSpec(
    name="quantize_scales",
    summary="nested quantisation of 4-bit scales with bitsandbytes' 8-bit codes",
    variants=("",),
    dtypes=FLOATS,  # of the weight; its scales are fp32 whatever that is
    sizes={
        "typical": {"rows": 300, "blocksize": 64},
        "usual": {"rows": 1024, "blocksize": 256},
        "short block": {"rows": 700, "blocksize": 256},
        "widest": {"rows": 4097, "blocksize": 4096},
        "two": {"rows": 2, "blocksize": 256},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=lambda p, which: 9 * p.dims["rows"] + 4 * p.dims["rows"] // p.dims["blocksize"],
    flops=lambda p, which: 20 * p.dims["rows"],
    exact=_exact,
    zero_of_equals=("absmax2",),  # equal scales less their mean: a GPU's sum of 300 has no error here, a CPU's has
    integer_slack={} if dispatch.INTERPRETED else {"codes": 0.01},  # by the last bit of a GPU's reciprocal
    peer=Peer("bitsandbytes.functional.quantize_blockwise", "bitsandbytes", _bitsandbytes),
    laws=(Law("codes(4x) = codes(x)", _shifted), Law("of two equally near entries the even one", _ties)),
    mutants=MUTANTS,
)
