"""The division that gated activations use, against the one that it stands for."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sparktune.ops import dispatch, glu
from sparktune.ops.numerics import quotient
from sparktune.ops.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = (
    0.0,
    -0.0,
    1.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    88.0,
    -88.0,
    -88.5,
    -89.0,
    -104.0,
    1e-45,
    3e38,
    -3e38,
)


@triton.jit
def quotient_kernel(a_ptr, d_ptr, q_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = quotient(tl.load(a_ptr + i, mask=i < n, other=0.0), tl.load(d_ptr + i, mask=i < n, other=1.0))
    tl.store(q_ptr + i, q, mask=i < n)


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    kind = torch.int32 if found.dtype == torch.float32 else torch.int16
    return (found.view(kind) == wanted.view(kind)) | (found.isnan() & wanted.isnan())


def test_a_quotient_has_the_bits_of_a_division():
    g = torch.Generator().manual_seed(3)
    n = 2**24 if DEVICE == "cuda" else 2**12
    bits = torch.randint(-(2**31), 2**31 - 1, (n,), generator=g).to(torch.int32).view(torch.float32)
    a = torch.cat((torch.tensor(SPECIAL), bits, torch.randn(n, generator=g))).to(DEVICE)
    d = 1.0 + torch.exp(torch.cat((-torch.tensor(SPECIAL), torch.randn(2 * n, generator=g) * 40))).to(DEVICE)
    q = torch.empty_like(a)
    dispatch.launch(quotient_kernel, triton.cdiv(len(a), 1024), a, a, d, q, len(a), BLOCK=1024, num_warps=4)
    wanted = a / d
    # What corrects an a below 2**-100 has itself lost bits below the least number that there is.
    tiny = a.abs() < 2.0**-100
    assert bool((same_bits(q, wanted) | tiny).all())
    steps = (q.view(torch.int32).long() - wanted.view(torch.int32)).abs()
    assert int(steps[tiny].max()) <= 1


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's exp is not the device's: tests of the op bound it there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_gate_of_16_bits_has_the_silu_of_pytorch(dtype):
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype)
    found = swiglu(gate, torch.ones_like(gate))
    assert bool(same_bits(found, torch.nn.functional.silu(gate)).all())


def test_more_rows_than_a_grid_has_are_taken_by_several_launches(monkeypatch):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 40, generator=g).to(DEVICE)
    gate, up = glu.halves(wide)
    whole = swiglu(gate, up, room=8)
    monkeypatch.setattr(glu, "MOST_ROWS", 3)
    before = dispatch.launches().get("sparktune.ops.swiglu.forward_kernel", 0)
    assert torch.equal(swiglu(gate, up, room=8), whole)
    assert dispatch.launches()["sparktune.ops.swiglu.forward_kernel"] == before + 3
