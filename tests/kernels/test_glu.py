"""The gated activations' contract besides numbers: merged inputs, one gradient, room, libraries they stand for, errors."""

import pytest
import torch
from sparktune.ops import dispatch
from sparktune.ops.geglu import geglu
from sparktune.ops.swiglu import swiglu
from sparktune.ops.swiglu_clamped import swiglu_clamped

pytestmark = pytest.mark.kernels(together=True)
OPS = {"swiglu": swiglu, "geglu": geglu, "swiglu_clamped": swiglu_clamped}


def merged(device, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_merged_is_apart_with_its_bits(op, device):
    both = merged(device, 2, 7, 80)
    gate, up = (t.detach().clone().requires_grad_() for t in both.chunk(2, -1))
    y, want = op(both), op(gate, up)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y)
    (grad,) = torch.autograd.grad(y, both, gy)
    assert torch.equal(y, want)
    assert torch.equal(grad, torch.cat(torch.autograd.grad(want, (gate, up), gy), -1))


def test_interleaved_is_side_by_side_with_its_bits(device):
    both = merged(device, 7, 80)
    apart = torch.cat((both[:, ::2], both[:, 1::2]), -1).detach().requires_grad_()
    y, want = swiglu_clamped(both), swiglu_clamped(apart, interleaved=False)
    (grad,), (other,) = (torch.autograd.grad(o.sum(), x) for o, x in ((y, both), (want, apart)))
    assert torch.equal(y, want) and torch.equal(torch.cat((grad[:, ::2], grad[:, 1::2]), -1), other)


@pytest.mark.parametrize("op", OPS)
def test_room_is_left_behind_every_row_and_can_be_written(op, device):
    both = merged(device, 2, 7, 80)
    seen = []
    x = both * 1
    x.register_hook(seen.append)  # the gradient as the backward gives it
    y = OPS[op](x, room=16, grad_room=8)
    want = OPS[op](both.detach())
    assert y.shape == (2, 7, 40) and y.stride() == (7 * 56, 56, 1)
    y.sum().backward()
    assert seen[0].shape == x.shape and seen[0].stride() == (7 * 88, 88, 1)
    with torch.no_grad():  # all room belongs to the buffer, the last row's too
        wide = y.detach().as_strided((2, 7, 56), (7 * 56, 56, 1))
        wide[..., 40:] = 3
        seen[0].as_strided((2, 7, 88), (7 * 88, 88, 1))[..., 80:] = 3
    assert torch.equal(y, want)
    assert torch.equal(both.grad, torch.autograd.grad(OPS[op](both).sum(), both)[0])


@pytest.mark.parametrize("op", OPS)
def test_room_and_merged_gradients_survive_compilation(op, device):
    both = merged(device, 7, 80)
    compiled = torch.compile(lambda x: OPS[op](x, room=16, grad_room=8), fullgraph=True, backend="aot_eager")
    dispatch.reset()
    y = compiled(both)
    y.float().pow(2).sum().backward()
    counts = dispatch.watermarks()[op]
    assert y.stride() == (56, 1) and counts["reference"] == 0 and counts["triton"] + counts["interpreter"] == 1
    want = OPS[op](both.detach().requires_grad_())
    assert torch.equal(y, want)


@pytest.mark.parametrize("op", OPS)
def test_one_launch_a_pass(op, device):
    dispatch.reset()
    OPS[op](merged(device, 7, 80)).sum().backward()
    assert list(dispatch.launches().values()) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_clamped_form_is_gpt_oss(device, dtype):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    class Config:
        intermediate_size, num_local_experts, hidden_size = 8, 1, 8

    x = merged(device, 9, 160, dtype=dtype).detach() * 6
    y, want = swiglu_clamped(x), GptOssExperts(Config())._apply_gate(x)
    if device.type == "cuda":
        assert torch.equal(y, want)
    else:  # the interpreter's exp differs in its last bit
        torch.testing.assert_close(y, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert (y != want).float().mean() < 0.01 or dtype == torch.float32


@pytest.mark.parametrize(("activation", "approximate"), [("gelu_pytorch_tanh", "tanh"), ("gelu", "none")])
def test_geglu_is_gemma(device, activation, approximate):
    from transformers.activations import ACT2FN

    gate, up = merged(device, 9, 160).detach().chunk(2, -1)
    want = ACT2FN[activation](gate) * up
    torch.testing.assert_close(geglu(gate, up, approximate), want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: swiglu(x[..., :79]), "swiglu: gate and up merged need an even last dimension"),
        (lambda x: geglu(x, x[..., :40]), "geglu: gate and up must have one shape"),
        (lambda x: geglu(x, x.float()), "geglu: gate and up must both be"),
        (lambda x: geglu(x, x, "sigmoid"), "approximate must be one of none, tanh"),
        (lambda x: swiglu(x, x, grad_room=8), "only a merged gradient can have room"),
        (lambda x: swiglu(x, room=-1), "room must not be negative"),
        (lambda x: swiglu_clamped(x, limit=0), "limit must be positive"),
        (lambda x: swiglu_clamped(x.double()), "fp32, bf16 or fp16"),
        (lambda x: swiglu_clamped(x[0, 0, 0]), "even last dimension"),
    ],
)
def test_wrong_arguments_get_a_sentence(device, call, match):
    with pytest.raises(ValueError, match=match):
        call(merged(device, 1, 3, 80))
