r"""NF4 and FP4 quantisation with the codes and scales of bitsandbytes; `quantize_scales` then nests the scales.

For each block of B elements, in row-major order, the last one possibly shorter:

    a = max |x|                          kept in fp32, one for each block
    z = x (1 / a)                        two fp32 steps; 1 / a is the GPU's approximate reciprocal, as in bitsandbytes
    NF4: code = number of thresholds below z, among the 15 midpoints between its values
    FP4: code = magnitude's code by the number of thresholds below |z|, among 7; 8 more where z < 0

Thresholds are fp32 numbers; z equal to one takes the lower value, in FP4 the smaller magnitude. A block of zeros has
a = 0 and codes 0, as in bitsandbytes' CUDA code, where 0 (1 / 0) is above no threshold; its CPU code has NF4's 7. Both
read as zero.

Shapes: x of n elements, fp32, bf16 or fp16, contiguous or not -> packed uint8 [(n + 1) // 2, 1], as bitsandbytes has
it, the earlier element in the high half, and absmax fp32 [ceil(n / B)]. No gradient. A NaN makes its block's
scale NaN, so that it shows in every value of the block; bitsandbytes may drop it.

Bytes: reads 2n in 16 bits, writes n/2 and 4n/B.

Source: Dettmers et al., "QLoRA", 2023. The thresholds are those of bitsandbytes 0.50.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparktune.ops import dispatch
from sparktune.ops.dequantize_4bit import BLOCKSIZES, NF4, TABLES
from sparktune.ops.device import DeviceProperties
from sparktune.ops.fused import Fused
from sparktune.ops.launching import cdiv
from sparktune.ops.numerics import reciprocal
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Outputs, Peer, Problem, Tensors

# NF4: halfway between neighbours. FP4: between magnitudes, in bitsandbytes' six to eight digits, which a value of 16 bits
# over another can meet exactly.
NF4_MIDPOINTS = tuple(((torch.tensor(NF4[:-1]).double() + torch.tensor(NF4[1:]).double()) / 2).float().tolist())
FP4_MIDPOINTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)  # by magnitude


@functools.cache
def _tables(device: torch.device, quant_type: str) -> tuple[Tensor, Tensor]:
    """(midpoints, fp32; codes by rank, int32)."""
    middle, codes = (FP4_MIDPOINTS, FP4_CODES) if quant_type == "fp4" else (NF4_MIDPOINTS, range(16))
    return torch.tensor(middle, device=device), torch.tensor(list(codes), dtype=torch.int32, device=device)


def reference(x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (packed, absmax); on a GPU but for values that the reciprocal's last bit moves over a threshold."""
    middle, codes = _tables(x.device, quant_type)
    flat = x.detach().reshape(-1).float()
    n = flat.numel()
    rows = torch.nn.functional.pad(flat, (0, -n % blocksize)).view(-1, blocksize)
    absmax = rows.abs().amax(1) if n else rows.new_zeros(0)
    inverse = 1.0 / torch.where(absmax > 0, absmax, 1.0)
    z = torch.where(absmax[:, None] > 0, rows * inverse[:, None], float("nan")).reshape(-1)[: n + n % 2]
    sign = (z < 0).to(torch.uint8) << 3 if quant_type == "fp4" else 0
    z = z.abs() if quant_type == "fp4" else z
    rank = torch.bucketize(torch.where(z.isnan(), -2.0, z), middle)  # NaN is above nothing
    code = codes[rank].to(torch.uint8) | sign
    return ((code[0::2] << 4) | code[1::2]).unsqueeze(1), absmax


@triton.jit
def quantize_kernel(
    x_ptr, middle_ptr, codes_ptr, packed_ptr, absmax_ptr, n, FP4: tl.constexpr, COUNT: tl.constexpr,
    HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS quantisation blocks of 2 HALF elements a program."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = tl.minimum(n - first * (2 * HALF), 2 * HALF * BLOCKS).to(tl.int32)
    block = tl.arange(0, BLOCKS)[:, None]
    place = block * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    x = tl.load(x_ptr + first * (2 * HALF) + place, mask=place < left, other=0.0).to(tl.float32)
    a = tl.max(tl.abs(x), 1)
    a = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), a)  # tl.max drops NaN
    inverse = reciprocal(tl.where(a > 0, a, 1.0))
    z = tl.where(a[:, None] > 0, x * inverse[:, None], float("nan"))
    sign = tl.zeros((BLOCKS, 2 * HALF), tl.int32)
    if FP4:
        sign = (z < 0).to(tl.int32) << 3
        z = tl.abs(z)
    rank = tl.zeros((BLOCKS, 2 * HALF), tl.int32)
    for i in tl.static_range(COUNT):
        rank += (z > tl.load(middle_ptr + i)).to(tl.int32)
    code = tl.load(codes_ptr + rank) | sign
    high, low = tl.split(tl.reshape(code, (BLOCKS, HALF, 2)))
    byte = block * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + first * HALF + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < left)
    row = tl.arange(0, BLOCKS)
    tl.store(absmax_ptr + first + row, a, mask=row * (2 * HALF) < left)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    blocks: int  # quantisation blocks a program
    num_warps: int

    TILE = 4096  # elements, 16 a thread: the reduction over a block then needs few shuffles

    @classmethod
    def choose(cls, blocksize: int, p: DeviceProperties) -> Config:
        """A tile of 4096 elements, or of one block."""
        return cls(max(1, cls.TILE // blocksize), 8)


def _forward(x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    n = x.numel()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(cdiv(n, blocksize), dtype=torch.float32, device=x.device)
    if n and not isinstance(x, FakeTensor):  # whose tables would stay fakes
        c = Config.choose(blocksize, DeviceProperties.of(x.device))
        middle, codes = _tables(x.device, quant_type)
        dispatch.launch(
            quantize_kernel, cdiv(n, blocksize * c.blocks), x, x.contiguous(), middle, codes, packed, absmax, n,
            FP4=quant_type == "fp4", COUNT=middle.numel(), HALF=blocksize // 2, BLOCKS=c.blocks, num_warps=c.num_warps,
        )  # fmt: skip
    return packed, absmax


_OP = Fused("quantize_4bit", _forward, reference=reference, outputs=2)


def quantize_4bit(x: Tensor, blocksize: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """Codes uint8 [(n + 1) // 2, 1] and scales fp32 [ceil(n / blocksize)] of `x`, n elements. No gradient.

    Errors: ValueError for a blocksize bitsandbytes does not offer, an unknown quant_type, or a dtype other than fp32,
    bf16, fp16.
    """
    if x.dtype not in FLOATS:
        raise ValueError(f"quantize_4bit: x must be fp32, bf16 or fp16, got {x.dtype}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"quantize_4bit: blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")
    if quant_type not in TABLES:
        raise ValueError(f"quantize_4bit: quant_type must be one of {', '.join(TABLES)}, got {quant_type!r}")
    packed, absmax = _OP(x.detach(), blocksize, quant_type)
    return packed, absmax


VARIANTS = ("nf4", "fp4")


def _inputs(p: Problem) -> dict[str, Input]:
    return {"x": Input((p.dims["rows"], p.dims["columns"]), p.dtype)}


def _named(found: tuple[Tensor, Tensor]) -> Tensors:
    return {"packed": found[0], "absmax": found[1]}


def _call(t: Tensors, p: Problem) -> Outputs:
    return _named(quantize_4bit(t["x"], p.dims["blocksize"], p.variant))


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Outputs:
    packed, absmax = reference(t["x"], p.dims["blocksize"], p.variant)
    return {"packed": packed, "absmax": absmax.to(compute or absmax.dtype)}


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Outputs, Outputs]:
    absmax = reference(t["x"], p.dims["blocksize"], p.variant)[1]
    return {"absmax": absmax}, {"absmax": absmax}


def _bitsandbytes(t: Tensors, p: Problem) -> Outputs:
    from bitsandbytes import functional

    if not t["x"].is_cuda and (p.variant == "fp4" or p.dims["rows"] * p.dims["columns"] % p.dims["blocksize"]):
        # Its CPU code, unlike its CUDA code, gives zeros FP4's negative zero, and divides in a last, shorter block, where
        # elsewhere it multiplies by the inverse.
        return {}
    packed, state = functional.quantize_4bit(t["x"], blocksize=p.dims["blocksize"], quant_type=p.variant)
    return {"packed": packed, "absmax": state.absmax}


def _tail(t: Tensors, p: Problem) -> tuple[Tensors, Problem]:
    return {"x": t["x"][-4:]}, replace(p, dims={**p.dims, "rows": 4})


def _scaled(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    return call(t, p).float(), call({"x": t["x"] * 4}, p).float()  # codes do not depend on a power of two


def _mirrored(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    if p.variant != "fp4":
        return None
    zero = torch.tensor([0, 8], device=t["x"].device)  # FP4 is symmetric but for its zeros
    both = [call({"x": x}, p).long() for x in (t["x"], -t["x"])]
    nibbles = [torch.cat((b >> 4, b & 15)) for b in both]
    flipped = torch.where(torch.isin(nibbles[1], zero), 0, nibbles[1] ^ 8)
    return torch.where(torch.isin(nibbles[0], zero), 0, nibbles[0]).float(), flipped.float()


def _launches(p: DeviceProperties) -> list[Launch]:
    found = []
    for fp4 in (False, True):
        for blocksize in BLOCKSIZES:
            for dtype in FLOATS if blocksize == 64 else (torch.bfloat16,):
                c = Config.choose(blocksize, p)
                flags = {"FP4": fp4, "COUNT": 7 if fp4 else 15, "HALF": blocksize // 2, "BLOCKS": c.blocks}
                args = dict(x_ptr=f"*{TRITON_TYPES[dtype]}", middle_ptr="*fp32", codes_ptr="*i32", packed_ptr="*u8")
                args |= dict(absmax_ptr="*fp32", n="i32") | dict.fromkeys(flags, "constexpr")
                name, variant = TRITON_TYPES[dtype], "fp4" if fp4 else "nf4"
                when = f"blocksize {blocksize}"
                found.append(Launch(when, "quantize_kernel", args, flags, c.num_warps, 3, name, variant))
    return found


MUTANTS = Mutant.table(
    """ties-up: a value on a threshold rounded up
- (z > tl.load(middle_ptr + i))
+ (z >= tl.load(middle_ptr + i))
one-threshold-less: the largest value never chosen
- tl.static_range(COUNT)
+ tl.static_range(COUNT - 1)
signed-max: the largest value in place of the largest magnitude
- tl.max(tl.abs(x), 1)
+ tl.max(x, 1)
nan-dropped: a block with a NaN quantised as if it had none
- > 0, float("nan"), a)
+ > 1, float("nan"), a)
nibbles-swapped: the earlier element in the low half
- (high << 4) | low
+ (low << 4) | high
rank-for-code: FP4's rank stored as its code
- code = tl.load(codes_ptr + rank) | sign
+ code = rank | sign
sign-lost: FP4's sign left out
- code = tl.load(codes_ptr + rank) | sign
+ code = tl.load(codes_ptr + rank)
inverse-lost: scale kept inverted
- absmax_ptr + first + row, a,
+ absmax_ptr + first + row, inverse,
zero-block: blocks without a scale given codes
- tl.where(a[:, None] > 0, x * inverse[:, None], float("nan"))
+ x * inverse[:, None]
neighbour-scale: scale of the first block of a program for all of them
- x * inverse[:, None], float
+ x * tl.max(inverse, 0), float
tail-unwritten: the last partial tile left out
- cdiv(n, blocksize * c.blocks), x
+ max(1, n // (blocksize * c.blocks)), x
row-major-lost: elements taken in the order of memory instead of the tensor's
- x, x.contiguous(), middle
+ x, x.as_strided((n,), (1,)), middle
odd-end: the last byte of an odd count never written
- mask=byte * 2 < left)
+ mask=byte * 2 + 1 < left)
fp4-midpoint: one of FP4's thresholds at the power of two nearby
- 0.20833333, 0.29
+ 0.25, 0.29
silent-fallback: the reference run in place of the kernel
- packed, absmax = _OP(x.detach(),
+ packed, absmax = reference(x.detach(),
"""
)

OP = OpSpec(
    name="quantize_4bit",
    summary="NF4 and FP4 quantisation with bitsandbytes' codes and scales",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 12, "columns": 64, "blocksize": 64},
        **{f"blocksize {b}": {"rows": 3, "columns": b, "blocksize": b} for b in BLOCKSIZES},
        "prime": {"rows": 7, "columns": 211, "blocksize": 32},
        "many tiles": {"rows": 300, "columns": 64, "blocksize": 64},
        "one": {"rows": 1, "columns": 1, "blocksize": 64},
        "no rows": {"rows": 0, "columns": 64, "blocksize": 64},
        "huge": {"rows": 2**18 + 4, "columns": 8192, "blocksize": 64},
        "speed": {"rows": 14336, "columns": 16384, "blocksize": 64},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=lambda p, which: int(
        p.dims["rows"] * p.dims["columns"] * (p.dtype.itemsize + 0.5 + 4 / p.dims["blocksize"])
    ),
    flops=lambda p, which: 17 * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    # By the last bit of a GPU's reciprocal; bitsandbytes' codes are met to the bit, and the interpreter's division is exact.
    integer_slack={} if dispatch.INTERPRETED else {"packed": 0.02},
    integer_distance=255,
    peer=Peer("bitsandbytes.functional.quantize_4bit", "bitsandbytes", _bitsandbytes),
    laws=(Law("codes(4x) = codes(x)", _scaled), Law("FP4's codes of -x are those of x, mirrored", _mirrored)),
    mutants=MUTANTS,
)
