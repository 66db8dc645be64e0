"""What users do with the ops: autocast, torch.compile, mixed dtypes, frozen weights, shared gradients, wrong arguments."""

import pytest
import torch
from sparktune.ops import dequantize_4bit, dispatch, rms_norm, swiglu

pytestmark = pytest.mark.kernels(together=True)


def way(device):
    return "triton" if device.type == "cuda" else "interpreter"


def tensors(device, *shape, n=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=g).to(device, dtype).requires_grad_() for _ in range(n)]


def test_calls_and_launches_are_counted(device):
    dispatch.reset()
    a, b = tensors(device, 3, 40)
    swiglu.swiglu(a, b).sum().backward()
    assert dispatch.watermarks()["swiglu"] == {"triton": 0, "interpreter": 0, "reference": 0} | {way(device): 1}
    assert dispatch.launches() == {
        "sparktune.ops.swiglu.forward_kernel": 1,
        "sparktune.ops.swiglu.backward_kernel": 1,
    }


def test_a_residual_branch_keeps_its_gradient(device):
    a, b = tensors(device, 3, 40)
    (swiglu.swiglu(a, b) + a).pow(2).sum().backward()
    x, y = (t.detach().clone().requires_grad_() for t in (a, b))
    (swiglu.reference(x, y) + x).pow(2).sum().backward()
    torch.testing.assert_close(a.grad, x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_one_tensor_as_both_arguments(device):
    (a,) = tensors(device, 3, 40, n=1)
    swiglu.swiglu(a, a).sum().backward()
    x = a.detach().clone().requires_grad_()
    swiglu.reference(x, x).sum().backward()
    torch.testing.assert_close(a.grad, x.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient(device):
    x, w = tensors(device, 4, 40, n=1)[0], torch.ones(40, device=device)
    y = rms_norm.rms_norm(x, w)
    y.backward(torch.randn_like(y))
    assert w.grad is None and x.grad.abs().sum() > 0


def test_an_fp32_weight_over_bf16_activations_gives_what_pytorch_gives(device):
    x = tensors(device, 4, 40, n=1, dtype=torch.bfloat16)[0]
    w = torch.rand(40, device=device).requires_grad_()
    y = rms_norm.rms_norm(x, w)
    want = rms_norm.reference(x, w)
    assert y.dtype == want.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32


def test_changing_a_saved_input_in_place_is_noticed(device):
    a, b = tensors(device, 3, 40)
    c = a * 1
    y = swiglu.swiglu(c, b)
    c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_changes_nothing(device):
    a, b = tensors(device, 3, 40, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, want = swiglu.swiglu(a, b), swiglu.reference(a, b)
        (g,) = torch.autograd.grad(y.float().sum(), a)
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want)
    assert g.dtype == torch.bfloat16 and g.isfinite().all()


def test_compiled_code_calls_the_op_and_counts_every_call(device):
    a, b = tensors(device, 3, 40)
    w = torch.rand(40, device=device)
    layer = torch.compile(
        lambda x, y: rms_norm.rms_norm(swiglu.swiglu(x * 2, y), w) + 1, fullgraph=True, backend="aot_eager"
    )
    dispatch.reset()
    for _ in range(3):
        y = layer(a, b)
    assert dispatch.watermarks()["swiglu"][way(device)] == 3
    assert dispatch.watermarks()["rms_norm"][way(device)] == 3
    torch.testing.assert_close(y, rms_norm.reference(swiglu.reference(a * 2, b), w) + 1, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("blocksize", dequantize_4bit.BLOCKSIZES)
def test_what_bitsandbytes_quantised_comes_back_with_its_bits(device, compress, blocksize):
    bnb = pytest.importorskip("bitsandbytes.functional")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=compress)
        want = bnb.dequantize_4bit(packed, state)
        assert torch.equal(dequantize_4bit.from_state(packed, state), want)
        assert torch.equal(dequantize_4bit.from_state(packed.t(), state), bnb.dequantize_4bit(packed.t(), state))


def test_an_unlaunchable_kernel_raises_instead_of_falling_back(device, monkeypatch):
    class Broken:
        fn = swiglu.forward_kernel.fn

        def __getitem__(self, grid):
            def launch(*args, **options):
                raise RuntimeError("out of resource: shared memory")

            return launch

    monkeypatch.setattr(swiglu, "forward_kernel", Broken())
    dispatch.reset()
    with pytest.raises(RuntimeError, match="out of resource"):
        swiglu.swiglu(*tensors(device, 3, 40))
    assert dispatch.watermarks() == {}
