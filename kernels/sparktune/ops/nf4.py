r"""NF4 dequantisation, flat and nested, bit for bit what bitsandbytes gives.

The format: a tensor of n elements, taken in row-major order, is cut into blocks of B (32 to 4096). A block is stored
as its largest absolute value a and one 4-bit code an element, two codes a byte, the earlier element in the high half.
NF4's 16 values are quantiles of a normal distribution scaled to [-1, 1], with an exact zero at code 7:

    value = round(NF4[code] * a)                          the product in fp32, rounded once to the output's dtype

Nested ("double quantisation") stores the a themselves in 8 bits: blocks of 256 of them share a scale a2, their mean
is kept apart as an offset, and the codes index a table of 256 fp32 values:

    a = CODE8[code8] * a2 + offset                        two fp32 steps, each rounded: no fused multiply-add

Shapes: packed uint8 with (n + 1) // 2 bytes in any shape; absmax [ceil(n / B)], fp32, or uint8 with a `Nested`; out:
`shape`, n elements, fp32, bf16 or fp16. There is no backward: codes have no gradient, and the base weight is frozen.

Bytes, of 16-bit output: n/2 for codes, 2n for the output, and 4n/B (nested: n/B) for the scales: 2.52 n nested at B =
64.

A program takes a tile of 2048 bytes as [blocks, bytes a block], so that each scale is read, and unpacked, once a
block and spread along its row. The 16 values sit in a table of 64 bytes that stays in L1.

Source: Dettmers et al., "QLoRA", 2023, appendix E for the values.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.numerics import cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Peer, Problem, Tensors

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nested(NamedTuple):
    """What turns 8-bit scales back into fp32."""

    absmax: torch.Tensor  # [ceil(blocks / blocksize)], fp32: a2
    code: torch.Tensor  # [256], fp32
    offset: torch.Tensor  # one fp32 element
    blocksize: int = 256


@functools.cache
def _table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device).to(dtype)


@functools.cache
def _pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Byte -> its two values, the high half first: [256, 2]."""
    table = _table(device, dtype)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), -1)


def reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    nested: Nested | None = None,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch, in the same rounding order; the oracle is this with compute and dtype float64."""
    n = math.prod(shape)
    scale = absmax.reshape(-1)
    if nested is not None:
        outer = nested.absmax.to(compute).repeat_interleave(nested.blocksize)[: scale.numel()]
        scale = nested.code.to(compute)[scale.int()] * outer + nested.offset.to(compute)
    # Both values of a byte in one look-up, and no index an element: this also trains whole models on a CPU.
    values = _pairs(packed.device, compute).index_select(0, packed.reshape(-1).int()).reshape(-1)[:n]
    spread = scale.to(compute).repeat_interleave(blocksize)[:n]
    return (values * spread).to(dtype).reshape(shape)


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, table_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, n,
    NESTED: tl.constexpr, PER_SCALE: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCKS quantisation blocks of HALF bytes a program; PER_SCALE scales share one a2."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    byte = block * HALF + tl.arange(0, HALF)[None, :]
    present = block * (2 * HALF) < n
    if NESTED:
        code8 = tl.load(absmax_ptr + block, mask=present, other=0).to(tl.int32)
        a2 = tl.load(absmax2_ptr + block // PER_SCALE, mask=present, other=0.0)
        a = tl.load(code2_ptr + code8) * a2 + tl.load(offset_ptr)
    else:
        a = tl.load(absmax_ptr + block, mask=present, other=0.0)
    pair = tl.load(packed_ptr + byte, mask=byte * 2 < n, other=0).to(tl.int32)
    high = tl.load(table_ptr + (pair >> 4)) * a
    low = tl.load(table_ptr + (pair & 15)) * a
    values = tl.reshape(tl.join(high, low), (BLOCKS, 2 * HALF))
    place = block * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + place, cast(values, out_ptr.dtype.element_ty), mask=place < n)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    blocks: int  # quantisation blocks a tile
    num_warps: int

    TILE = 2048  # bytes of codes, 8 a thread; at 4 warps Triton 3.6 spills 92 bytes on sm_121

    @classmethod
    def choose(cls, blocksize: int, p: DeviceProperties) -> Config:
        """A tile of 2048 bytes, halved until the fp32 values it unpacks fit the shared memory they may pass through."""
        tile = cls.TILE
        while tile > blocksize // 2 and 8 * tile > p.shared_memory_per_block:
            tile //= 2
        return cls(max(1, 2 * tile // blocksize), 8)


def _launch(
    packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, out: torch.Tensor, nested: Nested | None
) -> None:
    n = out.numel()
    c = Config.choose(blocksize, DeviceProperties.of(out.device))
    table = _table(out.device, torch.float32)
    absmax2, code2, offset = (t.contiguous() for t in nested[:3]) if nested else (table, table, table)
    dispatch.launch(
        dequantize_kernel, triton.cdiv(n, blocksize * c.blocks), out, packed.contiguous(), absmax.contiguous(), table,
        absmax2, code2, offset, out, n, NESTED=nested is not None, PER_SCALE=nested.blocksize if nested else 1,
        HALF=blocksize // 2, BLOCKS=c.blocks, num_warps=c.num_warps,
    )  # fmt: skip


@dispatch.eager
def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    nested: Nested | None = None,
) -> torch.Tensor:
    """NF4 codes to floats: `packed` holds the codes of prod(shape) elements -> [*shape] of `dtype`. No gradient.

    Errors: ValueError for a blocksize bitsandbytes does not offer, a dtype other than fp32, bf16, fp16, sizes that
    don't agree, an absmax of the wrong dtype, an absmax that wants a gradient, or tensors on different devices.
    """
    n, shape = math.prod(shape), tuple(shape)
    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)  # bitsandbytes may store codes as another type
    blocks = -(-n // blocksize) if blocksize in BLOCKSIZES else 0
    wanted = torch.uint8 if nested else torch.float32
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"nf4: blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")
    if dtype not in FLOATS:
        raise ValueError(f"nf4: dtype must be fp32, bf16 or fp16, got {dtype}")
    if packed.numel() != (n + 1) // 2 or absmax.numel() != blocks:
        raise ValueError(
            f"nf4: {list(shape)} needs {(n + 1) // 2} bytes of codes and {blocks} scales, "
            f"got {packed.numel()} and {absmax.numel()}"
        )
    if absmax.dtype != wanted:
        raise ValueError(f"nf4: {'nested' if nested else 'flat'} scales must be {wanted}, got {absmax.dtype}")
    if nested and (
        nested.absmax.numel() != -(-blocks // nested.blocksize)
        or nested.code.numel() != 256
        or nested.offset.numel() != 1
        or any(t.dtype != torch.float32 for t in nested[:3])
    ):
        raise ValueError("nf4: nested needs fp32 absmax [ceil(scales / blocksize)], code [256] and one offset")
    if any(t.requires_grad for t in (absmax, *(nested[:3] if nested else ()))):
        raise ValueError("nf4: dequantisation has no gradient; detach the scales")
    way = dispatch.route("nf4", packed, absmax, *(nested[:3] if nested else ()))
    if way == "reference":
        out = reference(packed, absmax, blocksize, shape, dtype, nested)
    else:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
        if n:
            _launch(packed, absmax, blocksize, out, nested)
    dispatch.record("nf4", way)
    return out


def dequantize_4bit(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """`bitsandbytes.functional.dequantize_4bit(packed, state)` for an NF4 QuantState, the transposed form included."""
    if state.quant_type != "nf4":
        raise ValueError(f"nf4: quant_type must be nf4, got {state.quant_type}")
    nested = None
    if state.state2 is not None:
        nested = Nested(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    absmax = state.absmax if nested else state.absmax.float()
    out = dequantize_nf4(packed, absmax, state.blocksize, tuple(state.shape), state.dtype, nested)
    return out.t() if packed.shape[0] == 1 else out


def _inputs(p: Problem) -> dict[str, Input]:
    n, blocksize = p.dims["rows"] * p.dims["columns"], p.dims["blocksize"]
    blocks = -(-n // blocksize)

    def codes(count: int) -> Any:
        return lambda g: torch.randint(0, 256, (count,), dtype=torch.uint8, generator=g)

    def code8(g: torch.Generator) -> torch.Tensor:
        return torch.cat((torch.rand(255, generator=g) * 2 - 1, torch.ones(1))).sort().values

    half = (n + 1) // 2
    found = {"packed": Input((half,), torch.uint8, "constant", make=codes(half))}
    if p.variant == "flat":
        return found | {"absmax": Input((blocks,), torch.float32, positive=True)}
    return found | {
        "absmax": Input((blocks,), torch.uint8, "constant", make=codes(blocks)),
        "absmax2": Input((-(-blocks // 256),), torch.float32, positive=True),
        "code": Input((256,), torch.float32, "constant", make=code8),
        "offset": Input((1,), torch.float32, "parameter", centre=0.5, layouts=False),
    }


def _arguments(t: Tensors, p: Problem) -> tuple[Any, ...]:
    nested = Nested(t["absmax2"], t["code"], t["offset"]) if p.variant == "nested" else None
    return t["packed"], t["absmax"], p.dims["blocksize"], (p.dims["rows"], p.dims["columns"]), p.dtype, nested


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> torch.Tensor:
    packed, absmax, blocksize, shape, dtype, nested = _arguments(t, p)
    return reference(packed, absmax, blocksize, shape, compute or dtype, nested, compute or torch.float32)


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    out = _reference(t, p, None)  # nothing transcendental, so no slack
    return out, out


def _bitsandbytes(t: Tensors, p: Problem) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, absmax, blocksize, shape, dtype, nested = _arguments(t, p)
    inner = QuantState(nested.absmax, code=nested.code, blocksize=256, dtype=torch.float32) if nested else None
    state = QuantState(
        absmax, torch.Size(shape), blocksize=blocksize, quant_type="nf4", dtype=dtype,
        offset=nested.offset.reshape(()) if nested else None, state2=inner,
    )  # fmt: skip
    return dequantize_4bit(packed.reshape(-1, 1), state)


def _tail(t: Tensors, p: Problem) -> tuple[Tensors, Problem]:
    """The last 256 quantisation blocks, which share one a2."""
    blocksize = p.dims["blocksize"]
    small = replace(p, dims={**p.dims, "rows": 256 * blocksize // p.dims["columns"]})
    ends = {"packed": t["packed"][-128 * blocksize :], "absmax": t["absmax"][-256:]}
    return {**t, **ends} | ({"absmax2": t["absmax2"][-1:]} if p.variant == "nested" else {}), small


def _call(t: Tensors, p: Problem) -> torch.Tensor:
    return dequantize_nf4(*_arguments(t, p))


def _linear(call: Any, t: Tensors, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Doubling every scale doubles the result, bit for bit."""
    doubled = {k: t[k] * 2 for k in (("absmax",) if p.variant == "flat" else ("absmax2", "offset"))}
    return call(t, p) * 2, call({**t, **doubled}, p)


def _launches(p: DeviceProperties) -> list[Launch]:
    found = []
    for blocksize in BLOCKSIZES:
        c = Config.choose(blocksize, p)
        for variant in ("flat", "nested"):
            for dtype in FLOATS:
                nested = variant == "nested"
                args = dict(packed_ptr="*u8", absmax_ptr="*u8" if nested else "*fp32", table_ptr="*fp32")
                args |= dict(absmax2_ptr="*fp32", code2_ptr="*fp32", offset_ptr="*fp32")
                args |= dict(out_ptr=f"*{TRITON_TYPES[dtype]}", n="i32")
                flags = {"NESTED": nested, "PER_SCALE": 256 if nested else 1}
                flags |= {"HALF": blocksize // 2, "BLOCKS": c.blocks}
                args |= dict.fromkeys(flags, "constexpr")
                when = f"{variant}, blocksize {blocksize}"
                name = TRITON_TYPES[dtype]
                found.append(Launch(when, "dequantize_kernel", args, flags, c.num_warps, 3, name, variant))
    return found


MUTANTS = Mutant.table(
    """nibbles-swapped: the low half of a byte taken first
- tl.join(high, low)
+ tl.join(low, high)
fp4-sign: codes read as sign and magnitude
- (pair >> 4)
+ ((pair >> 4) ^ 8)
table-value: one value of the table off in its fifth digit
- 0.24611230194568634
+ 0.24612230194568634
table-order: two values of the table exchanged
- 0.5626170039176941, 0.7229568362236023
+ 0.7229568362236023, 0.5626170039176941
neighbour-scale: nested scale of the block before
- tl.load(absmax_ptr + block, mask=present, other=0).to(tl.int32)
+ tl.load(absmax_ptr + tl.maximum(block - 1, 0), mask=present, other=0).to(tl.int32)
first-scale: the first flat scale used throughout
- tl.load(absmax_ptr + block, mask=present, other=0.0)
+ tl.load(absmax_ptr + block * 0, mask=present, other=0.0)
no-offset: nested scales without the offset
- * a2 + tl.load(offset_ptr)
+ * a2
offset-scaled: offset added before the outer scale multiplies
- tl.load(code2_ptr + code8) * a2 + tl.load(offset_ptr)
+ (tl.load(code2_ptr + code8) + tl.load(offset_ptr)) * a2
first-outer-scale: the first outer scale used throughout
- block // PER_SCALE
+ block * 0
rounded-twice: table values rounded to the output's dtype before the product
- low = tl.load(table_ptr + (pair & 15)) * a
+ low = cast(tl.load(table_ptr + (pair & 15)), out_ptr.dtype.element_ty).to(tl.float32) * a
odd-end: the last element of an odd count never written
- mask=place < n)
+ mask=place < (n // 2) * 2)
tail-unwritten: the last partial tile left out
- triton.cdiv(n, blocksize * c.blocks), out
+ max(1, n // (blocksize * c.blocks)), out
row-major-lost: codes taken in the order of memory instead of the tensor's
- out, packed.contiguous(), absmax
+ out, packed.as_strided((packed.numel(),), (1,)), absmax
silent-fallback: the reference run in place of the kernel
- if way == "reference":
+ if True:
"""
)

OP = OpSpec(
    name="nf4",
    summary="NF4 dequantisation, flat and nested, bit for bit bitsandbytes'",
    variants=("nested", "flat"),
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 12, "columns": 64, "blocksize": 64},
        **{f"blocksize {b}": {"rows": 3, "columns": b, "blocksize": b} for b in BLOCKSIZES},
        "prime": {"rows": 7, "columns": 211, "blocksize": 32},
        "many scales": {"rows": 300, "columns": 32, "blocksize": 32},
        "one": {"rows": 1, "columns": 1, "blocksize": 64},
        "no rows": {"rows": 0, "columns": 64, "blocksize": 64},
        "huge": {"rows": 2**18 + 4, "columns": 8192, "blocksize": 64},
        "speed": {"rows": 14336, "columns": 16384, "blocksize": 64},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=lambda p, which: (
        sum(math.prod(i.shape) * i.dtype.itemsize for i in _inputs(p).values())
        + p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize
    ),
    flops=lambda p, which: p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    peer=Peer("bitsandbytes.functional.dequantize_4bit", "bitsandbytes", _bitsandbytes),
    tail=_tail,
    laws=(Law("twice the scales, twice the values", _linear),),
    mutants=MUTANTS,
)
