"""What broke other libraries' gated activations: 16-bit overflow on the way to a finite gradient, and shared memory."""

import pytest
import torch
from sparktune.ops import geglu, swiglu, swiglu_clamped

pytestmark = [
    pytest.mark.kernels(together=True),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # the interpreter's exp, as intended
]
OPS = {
    "swiglu": (swiglu.swiglu, swiglu.reference),
    "swiglu merged": (lambda g, u: swiglu.swiglu(torch.cat((g, u), -1)), swiglu.reference),
    "geglu tanh": (geglu.geglu, geglu.reference),
    "geglu erf": (lambda g, u: geglu.geglu(g, u, "none"), lambda g, u: geglu.reference(g, u, "none")),
}


def leaves(device, dtype, *values):
    return [torch.tensor(v, device=device).to(dtype).requires_grad_() for v in values]


@pytest.mark.parametrize("op", OPS)
def test_case_18_a_product_past_fp16_does_not_spoil_a_finite_gradient(op, device):
    ours, reference = OPS[op]
    # dy up is 2e6, past fp16's 65504; the gate's slope brings it back.
    gate, up = leaves(device, torch.float16, [-9.0, -7.0, -9.0, -12.0], [2000.0, -2000.0, 1000.0, 2000.0])
    dy = torch.tensor([1000.0, 1000.0, -2000.0, 1000.0], device=device)
    y = ours(gate, up)
    y.backward(dy.half())
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    reference(*wide).backward(dy.double())
    for t, w in zip((gate, up), wide, strict=True):
        assert t.grad.isfinite().all()
        torch.testing.assert_close(t.grad.double(), w.grad, rtol=2e-3, atol=1e-3)
    # PyTorch rounds between the steps, which is the trap.
    plain = [t.detach().clone().requires_grad_() for t in (gate, up)]
    reference(*plain).backward(dy.half())
    assert not plain[0].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_case_18_large_gates_saturate(op, device, dtype):
    ours, _ = OPS[op]
    largest = 60000.0
    gate, up = leaves(device, dtype, [largest, -largest, 300.0, -300.0, 0.0, -90.0], [1.0] * 6)
    y = ours(gate, up)
    y.backward(torch.ones_like(y))
    want = torch.tensor([largest, 0, 300, 0, 0, 0], device=device).to(dtype)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gate.grad, torch.tensor([1, 0, 1, 0, 0.5, 0], device=device).to(dtype))
    torch.testing.assert_close(up.grad, want)


def test_case_18_limits_hold_in_fp16(device):
    (x,) = leaves(device, torch.float16, [[60000.0, 60000.0, -60000.0, -60000.0, float("inf"), float("inf")]])
    y = swiglu_clamped.swiglu_clamped(x)
    y.backward(torch.full_like(y, 60000.0))
    want = swiglu_clamped.reference(x)
    assert torch.equal(y, want) and y.isfinite().all()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("op", OPS)
def test_case_02_an_output_gradient_of_one_number(op, device):
    ours, reference = OPS[op]
    g = torch.Generator().manual_seed(2)
    gate, up = (torch.randn(5, 40, generator=g).to(device).requires_grad_() for _ in range(2))
    ours(gate, up).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    reference(*wide).sum().backward()
    for t, w in zip((gate, up), wide, strict=True):
        torch.testing.assert_close(t.grad.double(), w.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_case_04_a_second_backward_is_the_first(op, device):
    ours, _ = OPS[op]
    g = torch.Generator().manual_seed(2)
    gate, up = (torch.randn(5, 40, generator=g).to(device).requires_grad_() for _ in range(2))
    y = ours(gate, up)
    first, second = (torch.autograd.grad(y, (gate, up), torch.ones_like(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rows", [0, 1])
def test_case_23_no_rows_and_one(rows, device):
    merged = torch.ones(rows, 6, device=device, requires_grad=True)
    for op in (swiglu.swiglu, geglu.geglu, swiglu_clamped.swiglu_clamped):
        y = op(merged)
        (grad,) = torch.autograd.grad(y.sum(), merged)
        assert y.shape == (rows, 3) and grad.shape == (rows, 6)
