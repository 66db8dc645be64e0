"""Both cross entropies where other libraries broke; numbers are those of shared/kernels.md."""

import pytest
import torch
from sparktune.ops import cross_entropy as plain
from sparktune.ops.cross_entropy import cross_entropy
from sparktune.ops.linear_cross_entropy import causal_lm_loss, linear_cross_entropy, shift_labels
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import linear

pytestmark = pytest.mark.kernels(together=True)


def rand(device, *shape, dtype=torch.float32, seed=1, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def problem(device, m=6, v=50, k=16, dtype=torch.float32):
    """(hidden, weight, labels), the first two wanting gradients; row 1 is ignored."""
    hidden = rand(device, m, k, dtype=dtype).requires_grad_()
    weight = rand(device, v, k, dtype=dtype, seed=2, scale=0.5).requires_grad_()
    labels = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(3)).to(device)
    labels[1:2] = -100
    return hidden, weight, labels


def both(hidden, weight, labels, **settings):
    """The loss by both ops: of the logits, and of the head in chunks."""
    return (
        cross_entropy(linear(hidden, weight), labels, **settings),
        linear_cross_entropy(hidden, weight, labels, chunk_rows=2, **settings)[0],
    )


@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"num_items_in_batch": 7}, {"num_items_in_batch": 0}])
def test_case_05_all_labels_ignored(device, settings):
    hidden, weight, labels = problem(device)
    for loss in both(hidden, weight, torch.full_like(labels, -100), **settings):
        assert float(loss) == 0.0
        for g in torch.autograd.grad(loss, [hidden, weight], retain_graph=True):
            assert bool((g == 0).all())


def test_case_05_all_row_weights_zero(device):
    hidden, weight, labels = problem(device)
    for loss in both(hidden, weight, labels, row_weights=torch.zeros(6, device=device)):
        assert float(loss) == 0.0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, [hidden, weight], retain_graph=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_case_06_nonfinite_values_on_ignored_rows_go_nowhere(device, bad):
    hidden, weight, labels = problem(device)
    clean = [torch.autograd.grad(loss, [hidden, weight]) for loss in both(hidden, weight, labels)]
    logits = linear(hidden, weight).detach()
    logits[1] = bad
    (g,) = torch.autograd.grad(cross_entropy(logits.requires_grad_(), labels), logits)
    assert bool(g.isfinite().all()) and not g[1].any()
    with torch.no_grad():
        hidden[1] = bad
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=2)[0]
    for a, b in zip(torch.autograd.grad(loss, [hidden, weight]), clean[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("margin", [4.0, 9.0, 14.0])
def test_case_07_a_confident_token_keeps_its_gradient(device, dtype, margin):
    """p_t - 1 is down to -1e-6, which p_t rounded to bf16 makes 0, and in fp32 4 of 24 bits of it are left."""
    logits = torch.zeros(1, 2, dtype=dtype, device=device)
    logits[0, 0] = margin
    labels = torch.zeros(1, dtype=torch.long, device=device)
    want = torch.tensor(margin, dtype=torch.float64)
    want = -torch.exp(-want) / (1 + torch.exp(-want))
    (g,) = torch.autograd.grad(cross_entropy(logits.requires_grad_(), labels), logits)
    # What is left is the rounding of the sum of exponentials, and of dx.
    allowed = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24 / abs(float(want)) + 1e-6
    assert abs(float(g[0, 0]) / float(want) - 1) < max(allowed, 2.0**-24 / abs(float(want)) * 1.1)
    assert abs(float(g[0, 1]) / float(want) + 1) < max(allowed, 2.0**-24 / abs(float(want)) * 1.1)


def test_case_07_large_logits_keep_the_last_bits_of_the_log_sum_exp(device):
    """At 3000 one fp32 number for the whole log-sum-exp has an error of up to 1e-4, and so have all p."""
    logits = (3000 + rand(device, 3, 40)).requires_grad_()
    labels = torch.tensor([0, 1, 2], device=device)
    (g,) = torch.autograd.grad(cross_entropy(logits, labels), logits)
    exact = logits.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(torch_cross_entropy(exact, labels), exact)
    assert float((g.double() - want).abs().max()) < 1e-7


@pytest.mark.parametrize("trained", [False, True])
def test_case_08_reduction_none_with_row_weights(device, trained):
    hidden, weight, labels = problem(device)
    leaves = [hidden, weight] if trained else [hidden]
    weight.requires_grad_(trained)
    w = torch.rand(6, generator=torch.Generator().manual_seed(5)).to(device)
    dloss = rand(device, 6, seed=6)
    want = torch_cross_entropy(linear(hidden, weight), labels, reduction="none") * w
    grads = torch.autograd.grad(want, leaves, dloss)
    for loss in both(hidden, weight, labels, reduction="none", row_weights=w):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(loss, leaves, dloss, retain_graph=True), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_case_08_row_weights_in_a_mean_and_a_sum(device, reduction):
    hidden, weight, labels = problem(device)
    w = torch.rand(6, generator=torch.Generator().manual_seed(5)).to(device)
    rows = torch_cross_entropy(linear(hidden, weight), labels, reduction="none") * w
    want = rows.sum() / (w[labels != -100].sum() if reduction == "mean" else 1)
    grads = torch.autograd.grad(want, [hidden, weight])
    for loss in both(hidden, weight, labels, reduction=reduction, row_weights=w):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(loss, [hidden, weight], retain_graph=True), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_case_09_gradients_are_summed_over_chunks_in_fp32(device):
    # p = 1/2 everywhere. The first row adds 128 to the gradient, each other 1/4, which in bf16 128 swallows.
    hidden = torch.full((9, 16), 0.5, dtype=torch.bfloat16, device=device)
    hidden[0] = 256
    weight = torch.zeros(2, 16, dtype=torch.bfloat16, device=device).requires_grad_()
    labels = torch.zeros(9, dtype=torch.long, device=device)
    linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk_rows=1)[0].backward()
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-130.0], [130.0]], device=device).expand(2, 16))


@pytest.mark.parametrize("v", [50257, 70001])
def test_case_10_vocabularies_that_are_large_or_odd(device, v):
    hidden, weight, labels = problem(device, 3, v, 4)
    labels[0], labels[2] = v - 1, 65535 if v > 65536 else 1
    weight.requires_grad_(False)
    logits = linear(hidden, weight)
    want = torch_cross_entropy(logits, labels)
    (grad,) = torch.autograd.grad(want, hidden)
    for loss in both(hidden, weight, labels):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        (g,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        torch.testing.assert_close(g, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beside", [float("nan"), 1e4])
def test_case_10_a_padded_vocabulary_is_cut_off_by_a_view(device, beside):
    """Logits [M, 64] of which 50 columns are words: what lies in the others is in neither the loss nor the gradient."""
    padded = torch.full((5, 64), beside, device=device)
    padded[:, :50] = rand(device, 5, 50)
    view = padded[:, :50].requires_grad_()
    labels = torch.tensor([49, 0, 7, -100, 3], device=device)
    loss = cross_entropy(view, labels)
    exact = view.detach().clone().requires_grad_()
    want = torch_cross_entropy(exact, labels)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, view), torch.autograd.grad(want, exact))


@pytest.mark.parametrize("softcap, scale", [(30.0, 1.0), (0.0, 0.0625), (2.0, 0.5)])
def test_case_11_soft_cap_and_logit_scale(device, softcap, scale):
    """Gemma 2 caps at 30, Cohere scales by 1/16."""
    hidden, weight, labels = problem(device)
    z = linear(hidden, weight) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    want = torch_cross_entropy(z, labels)
    grads = torch.autograd.grad(want, [hidden, weight])
    for loss in both(hidden, weight, labels, softcap=softcap, logit_scale=scale):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(loss, [hidden, weight], retain_graph=True), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("label", [50, 51, 63, 10**6, -1, -99, 2**31 + 3, -(2**40)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_case_11_a_label_outside_the_vocabulary_is_nan_and_reads_nothing(device, label, reduction):
    hidden, weight, labels = problem(device)
    kept = both(hidden, weight, labels, reduction="none")
    labels[2] = label
    others = torch.arange(6, device=device) != 2
    for loss, before in zip(both(hidden, weight, labels, reduction=reduction), kept, strict=True):
        if reduction == "none":
            assert bool(loss[2].isnan()) and torch.equal(loss[others], before[others])
        else:
            assert bool(loss.isnan())
        (g,) = torch.autograd.grad(loss.sum(), hidden, retain_graph=True)
        assert bool(g[2].isnan().all()) and bool(g[others].isfinite().all())


@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_case_12_micro_batches_add_up_to_the_whole_batch(device, kind, micro):
    hidden, weight, labels = problem(device, m=12)
    labels[3:7] = -100  # so that micro-batches differ in how many rows count
    count = int((labels != -100).sum())
    items = torch.tensor(count, device=device) if kind == "tensor" else count
    whole = torch_cross_entropy(linear(hidden.double(), weight.double()), labels)
    grads = torch.autograd.grad(whole, [hidden, weight])
    found = [torch.zeros((), device=device) for _ in range(2)], [[0.0, 0.0] for _ in range(2)]
    for at in range(0, 12, 12 // micro):
        rows = slice(at, at + 12 // micro)
        for i, loss in enumerate(both(hidden[rows], weight, labels[rows], num_items_in_batch=items)):
            found[0][i] += loss.detach()
            for j, g in enumerate(torch.autograd.grad(loss, [hidden, weight], retain_graph=True)):
                found[1][i][j] = found[1][i][j] + g
    for i in range(2):
        assert abs(float(found[0][i]) / float(whole) - 1) < 1e-6
        for a, b in zip(found[1][i], grads, strict=True):
            assert float((a.double() - b).norm() / b.norm()) < 1e-6


def test_case_13_a_tied_head_gets_both_of_its_gradients(device):
    embedding = rand(device, 50, 16).requires_grad_()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]], device=device)
    want = torch_cross_entropy(linear(embedding[ids][:, :-1], embedding).view(-1, 50), ids[:, 1:].reshape(-1))
    loss = causal_lm_loss(embedding[ids], embedding, ids)
    torch.testing.assert_close(loss, want)
    got, expected = (torch.autograd.grad(x, embedding)[0] for x in (loss, want))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_case_13_lora_on_the_head_is_in_the_loss_and_is_trained(device):
    hidden, weight, labels = problem(device)
    weight.requires_grad_(False)
    a, b = rand(device, 4, 16, seed=8).requires_grad_(), rand(device, 50, 4, seed=9).requires_grad_()
    want = torch_cross_entropy(linear(hidden, weight) + linear(linear(hidden, a), b) * 2.0, labels)
    loss, _ = linear_cross_entropy(hidden, weight, labels, lora_a=a, lora_b=b, lora_scale=2.0, chunk_rows=4)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for g, e in zip(*(torch.autograd.grad(x, [hidden, a, b]) for x in (loss, want)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_case_13_half_a_lora_and_a_quantised_head_are_refused(device):
    hidden, weight, labels = problem(device)
    with pytest.raises(ValueError, match="both A and B"):
        linear_cross_entropy(hidden, weight, labels, lora_a=rand(device, 4, 16))
    with pytest.raises(ValueError, match=r"dense \[V, K\]"):
        linear_cross_entropy(hidden, torch.zeros(50, 8, dtype=torch.uint8, device=device), labels)


def test_case_15_the_first_token_of_a_document_is_no_target(device):
    hidden, weight, _ = problem(device, m=8)
    hidden, labels = hidden.view(1, 8, 16), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]], device=device)
    assert shift_labels(labels, -100, positions).tolist() == [[2, 3, -100, 5, -100, 7, 8, -100]]
    packed, losses = linear_cross_entropy(hidden, weight, labels, shift=True, position_ids=positions)
    apart = [
        linear_cross_entropy(hidden[:, s], weight, labels[:, s], shift=True, reduction="sum")[0]
        for s in (slice(0, 3), slice(3, 5), slice(5, 8))
    ]
    torch.testing.assert_close(packed, sum(apart) / 5)
    assert losses.shape == labels.shape and losses[0, 2] == losses[0, 4] == losses[0, 7] == 0
    assert not torch.isclose(packed, causal_lm_loss(hidden, weight, labels))


def test_case_23_no_rows(device):
    hidden, weight, labels = problem(device, m=0)
    for loss in both(hidden, weight, labels):
        assert float(loss) == 0.0
        for g, t in zip(torch.autograd.grad(loss, [hidden, weight], retain_graph=True), (hidden, weight), strict=True):
            assert g.shape == t.shape and not g.any()


def test_case_23_one_token(device):
    hidden, weight, _ = problem(device, m=1)
    labels = torch.tensor([5], device=device)
    want = torch_cross_entropy(linear(hidden, weight), labels)
    for loss in both(hidden, weight, labels):
        torch.testing.assert_close(loss, want)
    shifted = causal_lm_loss(hidden.view(1, 1, 16), weight, labels.view(1, 1))  # nothing follows it
    assert float(shifted) == 0.0 and not torch.autograd.grad(shifted, hidden)[0].any()


def test_case_23_nan_in_memory_that_nobody_wrote(device):
    """Buffers of logits are padded and used again; what is beside a row is in nothing."""
    from sparkproof.judge.correctness import poisoned

    hidden, weight, labels = problem(device, m=7, v=37)
    want = torch_cross_entropy(linear(hidden, weight), labels)
    grads = torch.autograd.grad(want, [hidden, weight])
    with poisoned():
        losses = both(hidden, weight, labels)
        found = [torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for loss in losses]
    for loss, gs in zip(losses, found, strict=True):
        torch.testing.assert_close(loss, want)
        for a, b in zip(gs, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 10 GB of GPU memory")
def test_case_01_more_than_2_to_the_31_logits():
    v, m = 131072, 2**14 + 3
    logits = torch.empty(m, v, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    labels = torch.randint(0, v, (m,), device="cuda")
    loss = cross_entropy(logits, labels, reduction="none")
    last = logits.detach()[-3:].clone().requires_grad_()
    want = plain.reference(last, labels[-3:], None, None, -100, "none", 0.0, 0.0, 1.0)
    torch.testing.assert_close(loss[-3:], want, rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(g[-3:], torch.autograd.grad(want.sum(), last)[0])
