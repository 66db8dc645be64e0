"""What trainers do with the losses: transformers' contract, known row counts, checkpoints, compiled models, no waiting."""

import pytest
import torch
from sparktune.ops import dispatch, loss_chunks
from sparktune.ops.cross_entropy import cross_entropy
from sparktune.ops.device import SPARK, DeviceProperties
from sparktune.ops.linear_cross_entropy import causal_lm_loss, linear_cross_entropy, shift_labels
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import linear

pytestmark = pytest.mark.kernels(together=True)
H100 = DeviceProperties(132, 232448, 2048, 50 * 2**20, 90)


def rand(device, *shape, dtype=torch.float32, seed=1, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def problem(device, m=7, v=50, k=16, dtype=torch.float32):
    """(hidden, weight, labels), the first two wanting gradients; rows 1 and 4 are ignored."""
    hidden = rand(device, m, k, dtype=dtype).requires_grad_()
    weight = rand(device, v, k, dtype=dtype, seed=2, scale=0.5).requires_grad_()
    labels = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(3)).to(device)
    labels[1::3] = -100
    return hidden, weight, labels


def rows_launched():
    return dispatch.launches().get("sparktune.ops.loss_chunks.rows_kernel", 0)


@pytest.mark.parametrize("items", [None, 11, "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_causal_language_models_loss_is_that_of_transformers(device, dtype, items):
    ours = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    hidden, weight, _ = problem(device, m=12, dtype=dtype)
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(4)).to(device)
    ids[0, :2] = -100
    items = torch.tensor(11, device=device) if items == "tensor" else items
    batch = hidden.view(2, 6, 16)
    want = ours(linear(batch, weight), ids, 50, num_items_in_batch=items)
    loss = causal_lm_loss(batch, weight, ids, num_items_in_batch=items, chunk_rows=5)
    assert loss.dtype == want.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 2e-3}
    for a, b in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (loss, want)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_known_rows_are_all_that_is_computed(device):
    hidden, weight, labels = problem(device)
    dispatch.reset()
    free, _ = linear_cross_entropy(hidden, weight, labels, chunk_rows=1)
    assert rows_launched() == 7
    dispatch.reset()
    known, losses = linear_cross_entropy(hidden, weight, labels, chunk_rows=1, valid_rows=5)
    assert rows_launched() == 5
    assert torch.equal(known, free) and losses.shape == (7,) and not losses[labels == -100].any()
    for a, b in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (known, free)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    full = labels.clamp_min(0)
    dispatch.reset()
    linear_cross_entropy(hidden, weight, full, valid_rows=7)
    assert "sparktune.ops.loss_chunks.gather_kernel" not in dispatch.launches()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrong", [0, 4, 6, 7, 100])
def test_a_wrong_count_is_nan_and_no_number(device, wrong, reduction):
    hidden, weight, labels = problem(device)
    weight.requires_grad_(reduction == "mean")
    loss, _ = linear_cross_entropy(hidden, weight, labels, valid_rows=wrong, reduction=reduction)
    assert bool(loss.isnan().all())
    (g,) = torch.autograd.grad(loss.sum(), hidden)
    assert bool(g[labels != -100].isnan().all()) and not g[labels == -100].any()


def test_nothing_is_multiplied_that_nobody_wants(device, monkeypatch):
    hidden, weight, labels = problem(device)
    seen = []
    add, products = loss_chunks.add_product, loss_chunks._products
    monkeypatch.setattr(loss_chunks, "_products", lambda *a: (seen.append("products"), products(*a)))
    monkeypatch.setattr(loss_chunks, "add_product", lambda *a: (seen.append("sum"), add(*a)))
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert seen == []
    linear_cross_entropy(hidden, weight.detach(), labels)
    assert seen == ["products"]
    loss, _ = linear_cross_entropy(hidden.detach(), weight, labels)
    assert seen == ["products", "products", "sum"]
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight),
        torch.autograd.grad(torch_cross_entropy(linear(hidden, weight), labels), weight),
    )


def test_rows_are_computed_again_only_where_their_own_gradient_is_needed_for_a_parameter(device):
    hidden, weight, labels = problem(device)
    for leaves, again in (([hidden], 0), ([hidden, weight], 1)):
        weight.requires_grad_(len(leaves) > 1)
        dispatch.reset()
        loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="none")
        assert rows_launched() == 1
        torch.autograd.grad(loss, leaves, torch.ones_like(loss))
        assert rows_launched() == 1 + again


def test_losses_of_rows_come_beside_the_loss_and_carry_no_gradient(device):
    hidden, weight, labels = problem(device)
    loss, losses = linear_cross_entropy(hidden, weight, labels, row_weights=torch.full((7,), 2.0, device=device))
    want = torch_cross_entropy(linear(hidden, weight), labels, reduction="none")
    torch.testing.assert_close(losses, want.detach())
    torch.testing.assert_close(loss, want.sum() / 5)
    assert not losses.requires_grad and loss.requires_grad


def test_two_backwards_add_up(device):
    hidden, weight, labels = problem(device)
    loss, _ = linear_cross_entropy(hidden, weight, labels, chunk_rows=3)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    (loss * 1.0).backward()
    assert torch.equal(hidden.grad, once[0] * 2) and torch.equal(weight.grad, once[1] * 2)


@pytest.mark.parametrize("factor", [1.0, 0.125, 65536.0])
def test_a_loss_scale_reaches_the_gradients(device, factor):
    hidden, weight, labels = problem(device, dtype=torch.float16)
    (g,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0] * factor, hidden)
    a, b = (t.detach().double().requires_grad_() for t in (hidden, weight))
    (want,) = torch.autograd.grad(torch_cross_entropy(linear(a, b), labels), a)
    assert float((g.double() / factor - want).norm() / want.norm()) < 2e-3


def test_a_checkpoint_recomputes_the_same(device):
    hidden, weight, labels = problem(device)

    def loss(h):
        return linear_cross_entropy(h, weight, labels, chunk_rows=3)[0]

    plain = torch.autograd.grad(loss(hidden), [hidden, weight])
    for reentrant in (False, True):
        saved = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=reentrant)
        hidden.grad = weight.grad = None
        saved.backward()
        assert torch.equal(hidden.grad, plain[0]) and torch.equal(weight.grad, plain[1])


def test_an_fp32_head_under_autocast_gets_an_unrounded_gradient(device):
    hidden, weight, labels = problem(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    dh, dw = torch.autograd.grad(loss, [hidden, weight])
    assert loss.dtype == dh.dtype == dw.dtype == torch.float32
    assert float((dw != dw.bfloat16().float()).double().mean()) > 0.9
    exact = torch.autograd.grad(torch_cross_entropy(linear(hidden, weight), labels), [hidden, weight])
    for a, b in zip((dh, dw), exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-2


def test_a_compiled_model_has_the_loss_in_its_graph(device):
    _, weight, labels = problem(device)
    ids = labels.clamp_min(0).view(1, 7)

    def model(weight):
        h = torch.tanh(weight[ids]) * 2
        return causal_lm_loss(h, weight, ids, num_items_in_batch=5.0)

    want = model(weight)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(weight)
    assert torch.equal(loss, want)
    (a,), (b,) = (torch.autograd.grad(x, weight) for x in (loss, want))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "settings", [{}, {"num_items_in_batch": 5}, {"reduction": "none"}, {"valid_rows": 5}, {"shift": True}]
)
def test_nothing_waits_for_the_device(device, monkeypatch, settings):
    hidden, weight, labels = problem(device)
    hidden, labels = hidden.view(1, 7, 16), labels.view(1, 7)
    if "shift" in settings:
        settings = settings | {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device)}
    if "num_items_in_batch" in settings:
        settings = settings | {"num_items_in_batch": torch.tensor(5, device=device)}

    def step():
        loss, _ = linear_cross_entropy(hidden, weight, labels, chunk_rows=4, **settings)
        torch.autograd.grad([loss], [hidden, weight], [torch.ones_like(loss)])
        x = hidden[0].detach().clone().requires_grad_()
        other = {k: v for k, v in settings.items() if k in ("num_items_in_batch", "reduction")}
        loss = cross_entropy(x, labels[0] % 16, **other)
        torch.autograd.grad([loss], [x], [torch.ones_like(loss)])

    step()  # kernels are compiled
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def waits(*args, **options):
        raise AssertionError("this would wait for the device")

    for name in ("item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    monkeypatch.setattr(torch, "nonzero", waits)
    step()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_of_either_width_and_any_stride(device, dtype):
    hidden, weight, labels = problem(device)
    want = torch_cross_entropy(linear(hidden, weight), labels)
    strided = torch.full((7, 2), 10**6, dtype=dtype, device=device)
    strided[:, 0] = labels
    torch.testing.assert_close(cross_entropy(linear(hidden, weight), strided[:, 0]), want)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, strided[:, 0])[0], want)


def test_an_ignore_index_inside_the_vocabulary(device):
    hidden, weight, labels = problem(device)
    labels = labels.clamp_min(0)
    want = torch_cross_entropy(linear(hidden, weight), labels, ignore_index=0)
    torch.testing.assert_close(cross_entropy(linear(hidden, weight), labels, ignore_index=0), want)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, ignore_index=0)[0], want)


def test_shifted_labels_end_with_none(device):
    labels = torch.tensor([[5, 6, 7], [-100, 8, 9]], device=device)
    assert shift_labels(labels).tolist() == [[6, 7, -100], [8, 9, -100]]
    assert shift_labels(labels[:, :0]).shape == (2, 0)


def test_chunks_are_as_large_as_their_gemm_wants():
    def chunk(v, p, trained=False, rows=2**20):
        return loss_chunks.Config.choose(rows, v, 2, trained, 0, p).chunk

    assert [chunk(v, H100) for v in (262208, 151936, 128256, 32064)] == [1024, 1024, 1024, 4096]
    assert [chunk(v, SPARK) for v in (262208, 151936, 128256, 32064)] == [1024] * 4
    assert chunk(128256, H100, trained=True) == 2048
    assert chunk(128256, H100, rows=700) == 700


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must be \[7\]"),
        ({"labels": torch.zeros(7)}, "int64 or int32"),
        ({"weight": torch.zeros(50, 15)}, "hidden must be"),
        ({"weight": torch.zeros(50, 16, dtype=torch.bfloat16)}, "cast one, or use autocast"),
        ({"reduction": "max"}, "mean, sum, none"),
        ({"reduction": "none", "num_items_in_batch": 3}, "makes none"),
        ({"num_items_in_batch": torch.ones(2)}, "one number"),
        ({"row_weights": torch.ones(6)}, "row_weights must be"),
        ({"row_weights": torch.ones(7, requires_grad=True)}, "no gradient"),
        ({"label_smoothing": 1.0}, r"\[0, 1\)"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"logit_scale": 0.0}, "logit_scale must be positive"),
        ({"bias": torch.zeros(49)}, r"bias must be \[50\]"),
        ({"lora_a": torch.zeros(4, 16), "lora_b": torch.zeros(49, 4)}, r"B \[50, r\]"),
        ({"valid_rows": -1}, "must not be negative"),
        ({"position_ids": torch.zeros(7, dtype=torch.long)}, "shift=True"),
        ({"position_ids": torch.zeros(3, dtype=torch.long), "shift": True}, "position_ids must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    hidden, weight, labels = problem(torch.device("cpu"))
    call = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(call.pop("hidden"), call.pop("weight"), call.pop("labels"), **call)
