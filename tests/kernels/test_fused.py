"""`Fused` itself, with ops of plain PyTorch in place of kernels: what every op inherits from it."""

from __future__ import annotations

import pytest
import torch
from sparktune.ops import dispatch
from sparktune.ops.fused import Fused
from torch import Tensor

pytestmark = pytest.mark.kernels(together=True)


def _forward(x: Tensor, residual: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    y = total * scale * (weight if weight is not None else 1.0)
    return y, total, total.square()


def _backward(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor | None, scale: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx = dy * scale * (weight if weight is not None else 1.0) + dtotal
    dw = (dy * total * scale).sum(0) if needs[1] else torch.empty(0, device=dy.device)
    return dx, dw


def _reference(x: Tensor, residual: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, scale)[:2]


OP = Fused(
    "fused_of_these_tests", _forward, _backward, reference=_reference, outputs=2, grads=("x", "weight"),
    same={"residual": "x"}, save=lambda args, results: (results[1], args[2], args[3]),
)  # fmt: skip


def tensors(device):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=g).to(device).requires_grad_() for shape in ((4, 6), (4, 6), (6,))]


def loss(y, total):
    return (y * 3).sum() + total.square().sum()


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_are_those_of_autograd_shared_ones_too(device, weighted):
    x, r, w = tensors(device)
    w = w if weighted else None
    wanted = [x, r, w] if weighted else [x, r]
    found = torch.autograd.grad(loss(*OP(x, r, w, 0.5)), wanted)
    want = torch.autograd.grad(loss(*_reference(x, r, w, 0.5)), wanted)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_argument_gets_none_and_the_others_keep_theirs(device, frozen):
    args = tensors(device)
    args[frozen].requires_grad_(False)
    loss(*OP(*args, 0.5)).backward()
    want = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
    loss(*_reference(*want, 0.5)).backward()
    for a, b in zip(args, want, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_one_of_two_outputs_unused_still_gives_the_gradient(device):
    x, r, w = tensors(device)
    found = torch.autograd.grad(OP(x, r, w, 0.5)[1].sum(), [x, r, w], materialize_grads=True)
    assert torch.equal(found[0], torch.ones_like(x)) and torch.equal(found[1], found[0])
    assert not found[2].any()


def test_compiled_is_one_graph_with_the_same_numbers_and_true_counts(device):
    x, r, w = tensors(device)
    layer = torch.compile(lambda *t: loss(*OP(*t, 0.5)), fullgraph=True, backend="aot_eager")
    dispatch.reset()
    for _ in range(3):
        found = torch.autograd.grad(layer(x, r, w), [x, r, w])
    counts = dispatch.watermarks()["fused_of_these_tests"]
    assert counts["reference"] == 0 and counts["triton"] + counts["interpreter"] == 3
    want = torch.autograd.grad(loss(*OP(x, r, w, 0.5)), [x, r, w])
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_changed_input_is_noticed_before_the_backward(device):
    x, r, w = tensors(device)
    scaled = w * 1
    y, _ = OP(x, r, scaled, 0.5)
    with torch.no_grad():
        scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused_by_name(device):
    x, r, w = tensors(device)
    with pytest.raises(RuntimeError, match="fused_of_these_tests has no second derivative"):
        torch.autograd.grad(OP(x, r, w, 0.5)[0].square().sum(), x, create_graph=True)


def test_fake_tensors_launch_nothing(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = torch.empty(2, 8)
        dispatch.reset()
        dispatch.launch(None, 1, y, y)  # a kernel that is None could not be launched
    assert dispatch.launches() == {}
