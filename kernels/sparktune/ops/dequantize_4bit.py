r"""NF4 and FP4 dequantisation, flat and nested, bit for bit what bitsandbytes gives, plain or into a padded buffer.

The format: a tensor of n elements, taken in row-major order, is cut into blocks of B (32 to 4096). A block is stored
as its largest absolute value a and one 4-bit code an element, two codes a byte, the earlier element in the high half.
NF4's 16 values are quantiles of a normal distribution scaled to [-1, 1], with an exact zero at code 7; FP4's are sign
and magnitude, 0 to 12 twelfths:

    value = round(TABLE[code] * a)                        the product in fp32, rounded once to the output's dtype

Nested ("double quantisation") stores the a themselves in 8 bits: blocks of 256 of them share a scale a2, their mean
is kept apart as an offset, and the codes index a table of 256 fp32 values:

    a = CODE8[code8] * a2 + offset                        two fp32 steps, each rounded: no fused multiply-add

Shapes: packed uint8 with (n + 1) // 2 bytes in any shape; absmax [ceil(n / B)], fp32, or uint8 with a `Nested`; out:
`shape`, n elements, fp32, bf16 or fp16. `dequantize_into` writes [N, K] into a view whose rows lie further apart, the
upper left corner of a buffer with room for LoRA's factors; blocks may run across the ends of rows. There is no
backward: codes have no gradient, and the base weight is frozen.

Bytes, of 16-bit output: n/2 for codes, 2n for the output, and 4n/B (nested: n/B) for the scales: 2.52 n nested at B =
64.

A program takes a tile of codes as [blocks, bytes a block], so that each scale is unpacked once a block and spread along
its row. Within a tile places have 32 bits, since at 2.5 bytes an element the arithmetic for addresses adds up. The 16
values sit in a table of 64 bytes, one line of L1, so a look-up takes one pass whatever the codes of a warp are; a table
of 256 pairs halves the look-ups, but spreads them over 16 lines.

Source: Dettmers et al., "QLoRA", 2023, appendix E for NF4's values; bitsandbytes 0.50 for FP4's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.fused import Fused
from sparktune.ops.launching import cdiv
from sparktune.ops.numerics import cast
from sparktune.ops.spec import (
    DTYPES,
    FLOATS,
    TRITON_TYPES,
    Input,
    Launch,
    Law,
    Mutant,
    OpSpec,
    Outputs,
    Peer,
    Problem,
    Tensors,
)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # FP4's magnitudes by code
FP4 = tuple(sign * x / 12 for sign in (1.0, -1.0) for x in TWELFTHS)
TABLES = {"nf4": NF4, "fp4": FP4}


class Nested(NamedTuple):
    """What turns 8-bit scales back into fp32."""

    absmax: Tensor  # [ceil(blocks / blocksize)], fp32: a2
    code: Tensor  # [256], fp32
    offset: Tensor  # one fp32 element
    blocksize: int = 256


@functools.cache
def _table(device: torch.device, dtype: torch.dtype, quant_type: str) -> Tensor:
    return torch.tensor(TABLES[quant_type], dtype=torch.float32, device=device).to(dtype)


@functools.cache
def _pairs(device: torch.device, dtype: torch.dtype, quant_type: str) -> Tensor:
    """Byte -> its two values, the high half first: [256, 2]."""
    table = _table(device, dtype, quant_type)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), -1)


def reference(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested: Nested | None = None,
    quant_type: str = "nf4",
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Plain PyTorch, in the same rounding order; the oracle is this with compute and dtype float64."""
    n = math.prod(shape)
    scale = absmax.reshape(-1)
    if nested is not None:
        outer = nested.absmax.to(compute).repeat_interleave(nested.blocksize)[: scale.numel()]
        scale = nested.code.to(compute)[scale.int()] * outer + nested.offset.to(compute)
    # Both values of a byte in one look-up, and no index an element: this also trains whole models on a CPU.
    values = _pairs(packed.device, compute, quant_type).index_select(0, packed.reshape(-1).int()).reshape(-1)[:n]
    spread = scale.to(compute).repeat_interleave(blocksize)[:n]
    return (values * spread).to(dtype).reshape(tuple(shape))


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, table_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, n, width, row_stride,
    NESTED: tl.constexpr, PER_SCALE: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCKS quantisation blocks of HALF bytes a program; PER_SCALE scales share one a2. WHOLE: no tile is partial.

    ROWS: 0 writes n elements in a row; 1 writes rows of `width` elements, `row_stride` apart, to which whole blocks
    belong; 2 the same where blocks run across the ends of rows.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = tl.minimum(n - first * (2 * HALF), 2 * HALF * BLOCKS).to(tl.int32)  # elements of this tile
    block = tl.arange(0, BLOCKS)[:, None]
    # Without masks gate's weight of Llama-3.1-8B takes 65 us in place of 72 on an H100; with 8 bytes a thread, 55.
    present = None if WHOLE else block * (2 * HALF) < left
    other: tl.constexpr = None if WHOLE else 0
    # A thread takes the codes of 32 bytes of output, side by side, so nothing changes hands on the way to the store.
    side: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    byte = tl.max_contiguous(block * HALF + tl.arange(0, HALF)[None, :], (1, side))
    # `byte * 2 < left` would hide from Triton that neighbours share a fate: it then loads byte by byte.
    readable = None if WHOLE else byte < left - left // 2
    pair = tl.load(packed_ptr + first * HALF + byte, mask=readable, other=other).to(tl.int32)
    if NESTED:
        code8 = tl.load(absmax_ptr + first + block, mask=present, other=other).to(tl.int32)
        a2 = tl.load(absmax2_ptr + (first + block) // PER_SCALE, mask=present, other=other)
        a = tl.load(code2_ptr + code8) * a2 + tl.load(offset_ptr)
    else:
        a = tl.load(absmax_ptr + first + block, mask=present, other=other)
    high = tl.load(table_ptr + (pair >> 4)) * a
    low = tl.load(table_ptr + (pair & 15)) * a
    values = cast(tl.reshape(tl.join(high, low), (BLOCKS, 2 * HALF)), out_ptr.dtype.element_ty)
    within = tl.arange(0, 2 * HALF)[None, :]
    place = block * (2 * HALF) + within
    inside = None if WHOLE else place < left
    if ROWS == 0:
        tl.store(out_ptr + first * (2 * HALF) + place, values, mask=inside)
    else:
        here = (first * (2 * HALF)).to(n.dtype)  # which has 64 bits only where n does: division in 64 is slow
        top = here // width
        start = (here - top * width).to(tl.int32) + block * (2 * HALF)
        if ROWS == 2:
            start += within
        row = start // width
        offset = row.to(tl.int64) * row_stride + (start - row * width)
        if ROWS == 1:
            offset += within
        tl.store(out_ptr + top.to(tl.int64) * row_stride + offset, values, mask=inside)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    blocks: int  # quantisation blocks a tile
    num_warps: int

    TILE = 2048  # bytes of codes, 32 a thread: four loads of 8 in flight

    @classmethod
    def choose(cls, blocksize: int, rows: int, p: DeviceProperties) -> Config:
        """A tile of 2048 bytes of codes, which no block exceeds; `rows` as the kernel's ROWS.

        2 warps, not 4: 41.4 us for 43.1 in one row of elements, 42.1 for 47.2 in rows with room, of gate's weight of
        Llama-3.1-8B (one H200). Blocks of 512 and more spill with 2 on sm_12x; those that run across the ends of rows with
        4, in fp32.
        """
        return cls(2 * cls.TILE // blocksize, 8 if rows == 2 else 2 if blocksize < 512 else 4)


def _rows(out: Tensor, blocksize: int) -> int:
    if out.is_contiguous():
        return 0
    return 1 if out.shape[-1] % blocksize == 0 else 2


def _launch(
    packed: Tensor, absmax: Tensor, blocksize: int, out: Tensor, nested: Nested | None, quant_type: str
) -> None:
    if isinstance(out, FakeTensor):  # the table would stay a fake
        return
    n = out.numel()
    rows = _rows(out, blocksize)
    c = Config.choose(blocksize, rows, DeviceProperties.of(out.device))
    table = _table(out.device, torch.float32, quant_type)
    absmax2, code2, offset = (t.contiguous() for t in nested[:3]) if nested else (table, table, table)
    width, stride = (out.shape[-1], out.stride(0)) if out.dim() == 2 else (n, n)
    dispatch.launch(
        dequantize_kernel, cdiv(n, blocksize * c.blocks), out, packed.contiguous(), absmax.contiguous(), table,
        absmax2, code2, offset, out, n, width, stride, NESTED=nested is not None,
        PER_SCALE=nested.blocksize if nested else 1, HALF=blocksize // 2, BLOCKS=c.blocks, ROWS=rows,
        WHOLE=n % (blocksize * c.blocks) == 0, num_warps=c.num_warps,
    )  # fmt: skip


def _forward(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    blocksize: int, per_scale: int, shape: list[int], dtype: str, quant_type: str,
) -> Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=DTYPES[dtype], device=packed.device)
    if out.numel():
        _launch(packed, absmax, blocksize, out, _nested(absmax2, code2, offset, per_scale), quant_type)
    return out


def _plain(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    blocksize: int, per_scale: int, shape: list[int], dtype: str, quant_type: str,
) -> Tensor:  # fmt: skip
    nested = _nested(absmax2, code2, offset, per_scale)
    return reference(packed, absmax, blocksize, shape, DTYPES[dtype], nested, quant_type)


def _nested(absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None, per_scale: int) -> Nested | None:
    if absmax2 is None:
        return None
    assert code2 is not None and offset is not None
    return Nested(absmax2, code2, offset, per_scale)


_OP = Fused("dequantize_4bit", _forward, reference=_plain)


def check(
    packed: Tensor, absmax: Tensor, blocksize: int, shape: Sequence[int], nested: Nested | None, quant_type: str
) -> None:
    """Raise a ValueError for what does not fit together; see `dequantize_4bit`."""
    n = math.prod(shape)
    if quant_type not in TABLES:
        raise ValueError(f"dequantize_4bit: quant_type must be one of {', '.join(TABLES)}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(
            f"dequantize_4bit: blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}"
        )
    blocks = -(-n // blocksize)
    if packed.numel() != (n + 1) // 2 or absmax.numel() != blocks:
        raise ValueError(
            f"dequantize_4bit: {list(shape)} needs {(n + 1) // 2} bytes of codes and {blocks} scales, "
            f"got {packed.numel()} and {absmax.numel()}"
        )
    wanted = torch.uint8 if nested else torch.float32
    if absmax.dtype != wanted:
        kind = "nested" if nested else "flat"
        raise ValueError(f"dequantize_4bit: {kind} scales must be {wanted}, got {absmax.dtype}")
    if nested and (
        nested.absmax.numel() != -(-blocks // nested.blocksize)
        or nested.code.numel() != 256
        or nested.offset.numel() != 1
        or any(t.dtype != torch.float32 for t in nested[:3])
    ):
        raise ValueError("dequantize_4bit: nested needs fp32 absmax [ceil(scales / blocksize)], code [256], one offset")
    if any(t.requires_grad for t in (absmax, *(nested[:3] if nested else ()))):
        raise ValueError("dequantize_4bit: dequantisation has no gradient; detach the scales")


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested: Nested | None = None,
    quant_type: str = "nf4",
) -> Tensor:
    """4-bit codes to floats: `packed` holds the codes of prod(shape) elements -> [*shape] of `dtype`. No gradient.

    `quant_type`: nf4 or fp4. Errors: ValueError for a blocksize bitsandbytes does not offer, a dtype other than fp32,
    bf16, fp16, sizes that don't agree, an absmax of the wrong dtype, scales that want a gradient, or tensors on
    different devices.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dequantize_4bit: dtype must be fp32, bf16 or fp16, got {dtype}")
    packed = as_bytes(packed)
    check(packed, absmax, blocksize, shape, nested, quant_type)
    extra = (*nested[:3], blocksize, nested.blocksize) if nested else (None, None, None, blocksize, 1)
    out: Tensor = _OP(packed, absmax, *extra, list(shape), TRITON_TYPES[dtype], quant_type)
    return out


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    nested: Nested | None = None,
    quant_type: str = "nf4",
) -> None:
    """Write the weight into `out` [N, K], fp32, bf16 or fp16: any view with unit stride along K, nothing beside it.

    For code inside an op: neither differentiable nor an op of its own under torch.compile. Errors: as
    `dequantize_4bit`, and ValueError for another layout of `out`.
    """
    if out.dim() != 2 or (out.shape[1] > 1 and out.stride(1) != 1) or out.dtype not in FLOATS:
        raise ValueError(
            "dequantize_4bit: out must be fp32, bf16 or fp16 [N, K] with unit stride along K, "
            f"got {out.dtype} {list(out.shape)} with strides {list(out.stride())}"
        )
    packed = as_bytes(packed)
    check(packed, absmax, blocksize, out.shape, nested, quant_type)
    write(out, packed, absmax, blocksize, nested, quant_type)


def write(
    out: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, nested: Nested | None = None, quant_type: str = "nf4"
) -> None:
    """`dequantize_into` for what was checked before: codes as bytes, and sizes that fit."""
    way = dispatch.route("dequantize_4bit", out, packed, absmax, *(nested[:3] if nested else ()))
    if way == "reference":
        out.copy_(reference(packed, absmax, blocksize, tuple(out.shape), out.dtype, nested, quant_type))
    elif out.numel():
        _launch(packed, absmax, blocksize, out, nested, quant_type)
    dispatch.record("dequantize_4bit", way)


def as_bytes(packed: Tensor) -> Tensor:
    """Codes as bytes: bitsandbytes may store them as another type."""
    return packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)


def from_state(packed: Tensor, state: Any) -> Tensor:
    """What `bitsandbytes.functional.dequantize_4bit(packed, state)` gives, the transposed form included."""
    nested = None
    if state.state2 is not None:
        nested = Nested(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    absmax = state.absmax if nested else state.absmax.float()
    out = dequantize_4bit(packed, absmax, state.blocksize, tuple(state.shape), state.dtype, nested, state.quant_type)
    return out.t() if packed.shape[0] == 1 else out


VARIANTS = ("nf4 nested", "nf4 flat", "fp4 nested", "nf4 nested padded", "fp4 flat padded")


def _is_flat(p: Problem) -> bool:
    return "flat" in p.variant


def _kind(p: Problem) -> str:
    return p.variant[:3]


def _inputs(p: Problem) -> dict[str, Input]:
    n, blocksize = p.dims["rows"] * p.dims["columns"], p.dims["blocksize"]
    blocks = -(-n // blocksize)

    def codes(count: int) -> Any:
        return lambda g: torch.randint(0, 256, (count,), dtype=torch.uint8, generator=g)

    def code8(g: torch.Generator) -> Tensor:
        return torch.cat((torch.rand(255, generator=g) * 2 - 1, torch.ones(1))).sort().values

    half = (n + 1) // 2
    found = {"packed": Input((half,), torch.uint8, "constant", make=codes(half))}
    if "apart" in p.dims and "padded" in p.variant:  # where to write, laid out by the judge
        shape = (p.dims["rows"], p.dims["columns"])
        found["room"] = Input(shape, p.dtype, "constant", make=lambda g: torch.zeros(shape))
    if _is_flat(p):
        return found | {"absmax": Input((blocks,), torch.float32, positive=True)}
    return found | {
        "absmax": Input((blocks,), torch.uint8, "constant", make=codes(blocks)),
        "absmax2": Input((-(-blocks // 256),), torch.float32, positive=True),
        "code": Input((256,), torch.float32, "constant", make=code8),
        "offset": Input((1,), torch.float32, "parameter", centre=0.5, layouts=False),
    }


def _arguments(t: Tensors, p: Problem) -> tuple[Any, ...]:
    nested = Nested(t["absmax2"], t["code"], t["offset"]) if not _is_flat(p) else None
    return t["packed"], t["absmax"], p.dims["blocksize"], (p.dims["rows"], p.dims["columns"]), p.dtype, nested, _kind(p)


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensor:
    packed, absmax, blocksize, shape, dtype, nested, kind = _arguments(t, p)
    return reference(packed, absmax, blocksize, shape, compute or dtype, nested, kind, compute or torch.float32)


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensor, Tensor]:
    out = _reference(t, p, None)  # nothing transcendental, so no slack
    return out, out


def _bitsandbytes(t: Tensors, p: Problem) -> Outputs:
    from bitsandbytes import functional

    packed, absmax, blocksize, shape, dtype, nested, kind = _arguments(t, p)
    if kind == "fp4" and shape[1] % 2 and not packed.is_cuda:
        return {}  # bitsandbytes 0.50 has four decimal digits of FP4's values there, as in 0.6667
    inner = (
        functional.QuantState(nested.absmax, code=nested.code, blocksize=256, dtype=torch.float32) if nested else None
    )
    state = functional.QuantState(
        absmax, torch.Size(shape), blocksize=blocksize, quant_type=kind, dtype=dtype,
        offset=nested.offset.reshape(()) if nested else None, state2=inner,
    )  # fmt: skip
    return functional.dequantize_4bit(packed.reshape(-1, 1), state)


def _tail(t: Tensors, p: Problem) -> tuple[Tensors, Problem]:
    """The last 256 quantisation blocks, which share one a2."""
    blocksize = p.dims["blocksize"]
    small = replace(p, dims={**p.dims, "rows": 256 * blocksize // p.dims["columns"]})
    ends = {"packed": t["packed"][-128 * blocksize :], "absmax": t["absmax"][-256:]}
    return {**t, **ends} | ({"absmax2": t["absmax2"][-1:]} if not _is_flat(p) else {}), small


def _call(t: Tensors, p: Problem) -> Tensor:
    """Through the padded layout for the variants that say so: the corner of a buffer that must stay as it was."""
    packed, absmax, blocksize, shape, dtype, nested, kind = _arguments(t, p)
    if "padded" not in p.variant:
        return dequantize_4bit(packed, absmax, blocksize, shape, dtype, nested, kind)
    if "room" in t:
        dequantize_into(t["room"], packed, absmax, blocksize, nested, kind)
        out = t["room"].clone()
        t["room"].zero_()  # as it was
        return out
    buffer = torch.full((shape[0] + 2, shape[1] + 7), 3.0, dtype=dtype, device=packed.device)
    corner = buffer[: shape[0], : shape[1]]
    dequantize_into(corner, packed, absmax, blocksize, nested, kind)
    beside = torch.cat((buffer[shape[0] :].flatten(), buffer[: shape[0], shape[1] :].flatten()))
    # A write beside the corner shows as NaN in the result.
    return torch.where((beside == 3.0).all(), corner, float("nan"))


def _linear(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    """Doubling every scale doubles the result, bit for bit."""
    doubled = {k: t[k] * 2 for k in (("absmax",) if _is_flat(p) else ("absmax2", "offset"))}
    return call(t, p) * 2, call({**t, **doubled}, p)


def _launches(p: DeviceProperties) -> list[Launch]:
    """Every blocksize nested in bf16; the other dtypes, flat scales and both padded layouts at the usual blocksize."""
    found = []

    def add(blocksize: int, dtype: torch.dtype, nested: bool, rows: int, whole: bool = False) -> None:
        c = Config.choose(blocksize, rows, p)
        args = dict(packed_ptr="*u8", absmax_ptr="*u8" if nested else "*fp32", table_ptr="*fp32")
        args |= dict(absmax2_ptr="*fp32", code2_ptr="*fp32", offset_ptr="*fp32")
        args |= dict(out_ptr=f"*{TRITON_TYPES[dtype]}", n="i32", width="i32", row_stride="i32")
        flags = {"NESTED": nested, "PER_SCALE": 256 if nested else 1, "HALF": blocksize // 2, "BLOCKS": c.blocks}
        flags |= {"ROWS": rows, "WHOLE": whole}
        args |= dict.fromkeys(flags, "constexpr")
        kind, layout = "nested" if nested else "flat", ("", ", padded rows", ", padded rows, blocks across them")[rows]
        when = f"{kind}, blocksize {blocksize}{layout}{', whole tiles' if whole else ''}"
        found.append(Launch(when, "dequantize_kernel", args, flags, c.num_warps, 3, TRITON_TYPES[dtype], ""))

    for blocksize in BLOCKSIZES:
        add(blocksize, torch.bfloat16, True, 0)
    for blocksize in (32, 4096):
        add(blocksize, torch.float32, False, 0)
    for dtype in FLOATS:
        for nested, rows in ((True, 1), (False, 2), (True, 2)):
            add(64, dtype, nested, rows)
        for nested, rows in ((True, 0), (True, 1), (False, 1)):
            add(64, dtype, nested, rows, whole=True)
        if dtype != torch.bfloat16:
            add(64, dtype, True, 0)
        add(64, dtype, False, 0)
    return found


MUTANTS = Mutant.table(
    """nibbles-swapped: the low half of a byte taken first
- tl.join(high, low)
+ tl.join(low, high)
sign-flipped: codes read as sign and magnitude where they are not, and not where they are
- (pair >> 4)
+ ((pair >> 4) ^ 8)
table-value: one value of NF4's table off in its fifth digit
- 0.24611230194568634
+ 0.24612230194568634
table-order: two values of NF4's table exchanged
- 0.5626170039176941, 0.7229568362236023
+ 0.7229568362236023, 0.5626170039176941
fp4-subnormal: FP4's smallest magnitude taken for a twelfth
- (0.0, 0.0625, 8.0
+ (0.0, 1.0, 8.0
fp4-as-nf4: FP4 codes read with NF4's table
- "fp4": FP4}
+ "fp4": NF4}
neighbour-scale: nested scale of the block before
- tl.load(absmax_ptr + first + block, mask=present, other=other).to(tl.int32)
+ tl.load(absmax_ptr + tl.maximum(first + block - 1, 0), mask=present, other=other).to(tl.int32)
first-scale: the first flat scale used throughout
- a = tl.load(absmax_ptr + first + block,
+ a = tl.load(absmax_ptr + block * 0,
no-offset: nested scales without the offset
- * a2 + tl.load(offset_ptr)
+ * a2
offset-scaled: offset added before the outer scale multiplies
- tl.load(code2_ptr + code8) * a2 + tl.load(offset_ptr)
+ (tl.load(code2_ptr + code8) + tl.load(offset_ptr)) * a2
first-outer-scale: the first outer scale used throughout
- (first + block) // PER_SCALE
+ block * 0
rounded-twice: table values rounded to the output's dtype before the product
- low = tl.load(table_ptr + (pair & 15)) * a
+ low = cast(tl.load(table_ptr + (pair & 15)), out_ptr.dtype.element_ty).to(tl.float32) * a
odd-end: the last element of an odd count never written
- None if WHOLE else place < left
+ None if WHOLE else place < (left // 2) * 2
odd-byte: the last byte of an odd count never read
- byte < left - left // 2
+ byte < left // 2
tail-unwritten: the last partial tile left out
- cdiv(n, blocksize * c.blocks), out
+ max(1, n // (blocksize * c.blocks)), out
row-major-lost: codes taken in the order of memory instead of the tensor's
- out, packed.contiguous(), absmax
+ out, packed.as_strided((packed.numel(),), (1,)), absmax
row-stride: padded rows written as if they lay side by side
- row.to(tl.int64) * row_stride
+ row.to(tl.int64) * width
narrow-rows: rows placed in 32 bits
- row.to(tl.int64) * row_stride
+ row * row_stride
first-row: every tile of padded rows placed from the first row on
- top.to(tl.int64) * row_stride
+ top * 0
whole-blocks: every padded row taken to hold whole blocks
- return 1 if out.shape[-1] % blocksize == 0 else 2
+ return 1
padded-divides-block: the place within a row lost
- row_stride + (start - row * width)
+ row_stride
silent-fallback: the reference run in place of the kernel
- out: Tensor = _OP(packed, absmax,
+ out: Tensor = _plain(packed, absmax,
"""
)

OP = OpSpec(
    name="dequantize_4bit",
    summary="NF4 and FP4 dequantisation, flat, nested or padded, bit for bit bitsandbytes'",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 12, "columns": 64, "blocksize": 64},
        **{f"blocksize {b}": {"rows": 3, "columns": b, "blocksize": b} for b in BLOCKSIZES},
        "prime": {"rows": 7, "columns": 211, "blocksize": 32},
        "blocks a row": {"rows": 3, "columns": 128, "blocksize": 64},
        "many scales": {"rows": 300, "columns": 32, "blocksize": 32},
        "far": {"rows": 3, "columns": 64, "blocksize": 64, "apart": 1},
        "one": {"rows": 1, "columns": 1, "blocksize": 64},
        "no rows": {"rows": 0, "columns": 64, "blocksize": 64},
        "whole tiles": {"rows": 4, "columns": 2048, "blocksize": 64},
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
    inside_ops=tuple(v for v in VARIANTS if "padded" in v),
    laws=(Law("twice the scales, twice the values", _linear),),
    mutants=MUTANTS,
)
