"""What broke other libraries' norms and rotary embeddings: offsets, strides, shared gradients, overflow, padding."""

import functools
import mmap

import pytest
import torch
from sparktune.ops.add_rms_norm import add_rms_norm
from sparktune.ops.add_rms_norm import reference as add_rms_norm_reference
from sparktune.ops.layer_norm import layer_norm
from sparktune.ops.layer_norm import reference as layer_norm_reference
from sparktune.ops.qk_norm_rope import qk_norm_rope
from sparktune.ops.qk_norm_rope import reference as qk_norm_rope_reference
from sparktune.ops.rms_norm import reference as rms_norm_reference
from sparktune.ops.rms_norm import rms_norm
from sparktune.ops.rope import reference as rope_reference
from sparktune.ops.rope import rope
from sparktune.ops.rope_tables import RopeParameters, rope_tables

pytestmark = [
    pytest.mark.kernels(together=True),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),  # planted NaN
]
MAP_NORESERVE = 0x4000
FAR = 2**30  # elements: three of them pass 2**31


def normal(device, *shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def weight(device, n, dtype=torch.float32):
    return 1 + normal(device, n, seed=9, dtype=dtype) / 2


def tables(device, head_dim, length=64, **more):
    return rope_tables(RopeParameters(head_dim, **more), length, device)


# Every op as a function of one matrix of rows [M, 192]: ours and plain PyTorch.
def rows_op(name, op, device, dtype=torch.float32):
    w, b = weight(device, 192, dtype), normal(device, 192, seed=8, dtype=dtype)
    cos, sin = tables(device, 32)
    heads = {"rope": (), "qk_norm_rope": (w[:32], w[32:64])}

    def run(x):
        if name == "rms_norm":
            return op(x, w)
        if name == "add_rms_norm":
            return op(x, x.flip(0), w)
        if name == "layer_norm":
            return op(x, w, b)
        q, k = x[None, :, :128].unflatten(-1, (4, 32)), x[None, :, 128:].unflatten(-1, (2, 32))
        return tuple(t.flatten(-2).squeeze(0) for t in op(q, k, *heads[name], cos, sin))

    return run


OPS = {
    "rms_norm": (rms_norm, rms_norm_reference),
    "add_rms_norm": (add_rms_norm, add_rms_norm_reference),
    "layer_norm": (layer_norm, layer_norm_reference),
    "rope": (rope, rope_reference),
    "qk_norm_rope": (qk_norm_rope, qk_norm_rope_reference),
}


def both(name, device, dtype=torch.float32):
    return [rows_op(name, f, device, dtype) for f in OPS[name]]


def several(out):
    return out if isinstance(out, tuple) else (out,)


def agree(ours, want, rtol=1e-4, atol=1e-5):
    for a, b in zip(several(ours), several(want), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@functools.cache
def space(device, slot):
    """2**32 bf16 and some of address space; on a CPU only pages that are written take memory."""
    if device.type == "cuda":
        return torch.zeros(2**32 + 2**16, dtype=torch.bfloat16, device=device)
    memory = mmap.mmap(-1, 2**33 + 2**17, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def _free_space():
    yield
    space.cache_clear()


def far(t, stride, slot=0):
    """`t` with these strides, begun at 2**31: an offset that wraps is read where zeros are."""
    view = space(t.device, slot).as_strided(t.shape, stride, 2**31)
    view.copy_(t)
    return view


@pytest.mark.parametrize("dim", ["sequences", "tokens", "heads"])
@pytest.mark.parametrize("op", ["rope", "qk_norm_rope"])
def test_case_01_heads_tokens_and_sequences_far_apart(op, dim, device):
    shape, near = {
        "sequences": ((3, 1, 2, 16), (FAR, 32, 16, 1)),
        "tokens": ((1, 3, 2, 16), (0, FAR, 16, 1)),
        "heads": ((1, 1, 3, 16), (0, 0, FAR, 1)),
    }[dim]
    q = normal(device, *shape, dtype=torch.bfloat16)
    k = normal(device, *shape, seed=1, dtype=torch.bfloat16)
    w = (weight(device, 16, torch.bfloat16),) * 2 if op == "qk_norm_rope" else ()
    run = OPS[op][0]
    cos, sin = tables(device, 16)
    gy = [normal(device, *shape, seed=s, dtype=torch.bfloat16) for s in (2, 3)]
    want_in = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    want = run(*want_in, *w, cos, sin)
    want_grads = torch.autograd.grad(want, want_in, gy)
    inputs = [far(q, near).requires_grad_(), k.requires_grad_()]
    out = run(*inputs, *w, cos, sin)
    agree(out, want, 0, 0)
    far_gy = [far(gy[0], near, slot=1), gy[1]]
    agree(torch.autograd.grad(out, inputs, far_gy), want_grads, 0, 0)


@pytest.mark.parametrize("layout", ["one number", "one row", "slice", "transposed"])
@pytest.mark.parametrize("op", OPS)
def test_case_02_output_gradients_of_any_strides(op, layout, device):
    ours, plain = both(op, device)
    x = normal(device, 5, 192).requires_grad_()
    wide = normal(device, 5, 400, seed=3)

    def gradient(y):
        n = y.shape[-1]
        return {
            "one number": wide[0, 0].expand(y.shape),
            "one row": wide[:1, :n].expand(y.shape),
            "slice": wide[:, 7 : 7 + n],
            "transposed": wide[:, :n].t().contiguous().t(),
        }[layout]

    out, want = several(ours(x)), several(plain(x))
    agree(*(torch.autograd.grad(o, x, [gradient(y) for y in o]) for o in (out, want)))


@pytest.mark.parametrize("op", OPS)
def test_case_03_a_gradient_shared_with_a_residual_branch_is_left_alone(op, device):
    ours, plain = both(op, device)
    found = []
    for run in (ours, plain):
        x = normal(device, 5, 192).requires_grad_()
        h = x * 1  # not a leaf, so that its gradient is one tensor that all branches add to
        out = several(run(h))
        y = torch.cat(out, -1) if op in ("rope", "qk_norm_rope") else sum(out)
        z = y + h
        z.retain_grad()
        z.pow(2).sum().backward()
        assert torch.equal(z.grad, 2 * z), "the branch's own gradient was written to"
        found.append(x.grad)
    agree(*found)


def test_case_03_both_summands_keep_gradients_of_their_own(device):
    x, residual = (normal(device, 4, 64, seed=s).requires_grad_() for s in (0, 1))
    y, s = add_rms_norm(x, residual, weight(device, 64))
    (y + s).sum().backward()
    want = residual.grad.clone()
    assert torch.equal(x.grad, want)
    x.grad.mul_(3)  # as clipping one of them does
    assert torch.equal(residual.grad, want)


@pytest.mark.parametrize("op", OPS)
def test_case_04_a_second_backward_is_the_first(op, device):
    ours, _ = both(op, device)
    x = normal(device, 5, 192).requires_grad_()
    before, out = x.detach().clone(), several(ours(x))
    first, second = (torch.autograd.grad(out, x, out, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(x, before)


SCALED = {
    "default": {},
    "llama3": dict(
        kind="llama3", factor=8.0, original_positions=16, extra=dict(low_freq_factor=1.0, high_freq_factor=4.0)
    ),
    "yarn": dict(kind="yarn", factor=4.0, original_positions=16, max_positions=64),
}  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "share", "heads", "positions"),
    [
        (64, 1.0, (1, 1), torch.int32), (80, 0.4, (4, 1), torch.int64), (96, 1.0, (3, 3), torch.int64),
        (128, 1.0, (4, 2), torch.int32), (256, 0.25, (2, 1), torch.int64), (256, 1.0, (1, 1), torch.int32),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scaled", [*SCALED, "longrope"])
def test_case_17_every_head_and_table_turns_as_transformers_turns_it(scaled, head_dim, share, heads, positions, device):
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    more = SCALED.get(scaled) or {}
    if scaled == "longrope":
        factors = [1.0 + i / 8 for i in range(int(head_dim * share) // 2)]
        extra = dict(long_factor=factors, short_factor=factors[::-1])
        more = dict(kind="longrope", factor=None, original_positions=16, max_positions=64, extra=extra)
    cos, sin = tables(device, head_dim, partial=share, **more)
    at = torch.tensor([[0, 1, 2, 0, 1, 40, 63], [5, 6, 0, 1, 2, 3, 0]], device=device).to(positions)  # packed documents
    q, k = (normal(device, 2, 7, h, head_dim, seed=h).requires_grad_() for h in heads)
    full = [torch.cat((t[at.long()],) * 2, -1) for t in (cos, sin)]
    want = [t.transpose(1, 2) for t in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *full)]
    out = rope(q, k, cos, sin, at)
    agree(out, tuple(want), 0, 1e-6)
    gy = [normal(device, *t.shape, seed=5) for t in out]
    agree(torch.autograd.grad(out, (q, k), gy), torch.autograd.grad(want, (q, k), gy), 0, 1e-6)


def test_case_17_in_bf16_it_is_nearer_the_truth_than_transformers(device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = tables(device, 64, theta=500000.0)
    q, k = (normal(device, 1, 64, h, 64, seed=h, dtype=torch.bfloat16) for h in (4, 2))
    truth = rope_reference(q.double(), k.double(), cos.double(), sin.double(), compute=torch.float64)[0]
    full = [torch.cat((t, t), -1)[None].bfloat16() for t in (cos, sin)]
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *full)[0].transpose(1, 2)
    ours = rope(q, k, cos, sin)[0]
    mine, hf = (float((t.double() - truth).norm()) for t in (ours, theirs))
    assert mine < hf / 1.3


def test_case_17_interleaved_pairs_are_glms(device):
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    cos, sin = tables(device, 64, partial=0.5)
    q, k = (normal(device, 2, 7, h, 64, seed=h) for h in (4, 2))
    full = [torch.cat((t[:7],) * 2, -1)[None] for t in (cos, sin)]
    want = [t.transpose(1, 2) for t in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *full)]
    agree(rope(q, k, cos, sin, interleaved=True), tuple(want), 0, 1e-6)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "qk_norm_rope"])
def test_case_18_a_product_past_fp16_does_not_spoil_a_finite_gradient(op, device):
    # x^2 is 9e6, and dy w is 1e5, past fp16's 65504; r of 1/3000 brings it back.
    x = (3000 * normal(device, 4, 64).sign() + normal(device, 4, 64)).half()
    w = torch.full((64,), 100.0, device=device)
    gy = torch.full((4, 64), 1000.0, device=device) * normal(device, 4, 64, seed=1).sign()

    def run(f, x, w):
        if op == "rms_norm":
            return f(x, w)
        if op == "add_rms_norm":
            return f(x, x, w)[0]
        x = x[None, :, None]
        return f(x, x, w, w, *(t.to(w.dtype if w.dtype == torch.float64 else t.dtype) for t in tables(device, 64)))[0][
            0, :, 0
        ]

    ours, plain = OPS[op]
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    run(ours, leaves[0], w.half()).backward(gy.half())
    run(plain, leaves[1], w.half()).backward(gy.half())
    wide = x.double().requires_grad_()
    run(functools.partial(plain, compute=torch.float64), wide, w.double()).backward(gy.double())
    assert leaves[0].grad.isfinite().all()
    torch.testing.assert_close(leaves[0].grad.double(), wide.grad, rtol=5e-3, atol=0.1)
    assert not leaves[1].grad.isfinite().all(), "plain PyTorch rounds between the steps, which is the trap"


def test_case_18_a_residual_sum_past_fp16_is_what_pytorch_makes_of_it(device):
    x = torch.tensor([[60000.0, 1.0, 2.0, 3.0]], device=device).half()
    w = torch.ones(4, device=device).half()
    out, want = add_rms_norm(x, x, w), add_rms_norm_reference(x, x, w)
    assert out[1].isinf().any()
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_case_23_no_rows_and_one(op, rows, device):
    ours, plain = both(op, device)
    x = normal(device, rows, 192).requires_grad_()
    out, want = several(ours(x)), several(plain(x))
    agree(out, want)
    agree(*(torch.autograd.grad(o, x, [torch.ones_like(y) for y in o]) for o in (out, want)))


@pytest.mark.parametrize("op", OPS)
def test_case_23_nan_in_padding_rows_stays_there(op, device):
    ours, plain = both(op, device)
    x = normal(device, 5, 192)
    x[2] = float("nan")  # add_rms_norm adds row 4 - i to row i, so the middle one meets itself
    x.requires_grad_()
    kept = torch.tensor([0, 1, 3, 4], device=device)
    out, want = several(ours(x)), several(plain(x))
    for a, b in zip(out, want, strict=True):
        assert a[2].isnan().any()
        agree(a[kept], b[kept])
    grads = [torch.autograd.grad(o, x, [torch.ones_like(y) for y in o])[0] for o in (out, want)]
    agree(grads[0][kept], grads[1][kept])


@pytest.mark.parametrize("op", ["rope", "qk_norm_rope"])
def test_case_23_a_position_outside_the_tables_is_nan_for_its_token_alone(op, device):
    cos, sin = tables(device, 16, length=8)
    w = (weight(device, 16),) * 2 if op == "qk_norm_rope" else ()
    q, k = normal(device, 1, 4, 2, 16), normal(device, 1, 4, 1, 16, seed=1)
    for wrong in (8, -1, 2**31 - 1):
        at = torch.tensor([[3, wrong, 0, 7]], device=device)
        for t in OPS[op][0](q, k, *w, cos, sin, at):
            assert t[0, 1].isnan().all() and t[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 1023, 1025, 4097])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_case_23_widths_beside_every_block(op, n, device):
    ours, plain = OPS[op]
    w = weight(device, n)
    x = normal(device, 3, n).requires_grad_()
    args = (x, x) if op == "add_rms_norm" else (x,)
    out, want = several(ours(*args, w)), several(plain(*args, w))
    agree(out, want)
    gy = [normal(device, *y.shape, seed=7) for y in out]
    agree(*(torch.autograd.grad(o, x, gy) for o in (out, want)), 1e-4, 1e-4)
