"""LoRA inside the matrix product: it is PEFT's LoRA, merged layers are the layers apart, and what each call computes."""

import weakref

import pytest
import torch
from sparktune.ops import dispatch, lora_packed
from sparktune.ops.lora_linear import lora_linear
from sparktune.ops.lora_mlp import lora_mlp
from sparktune.ops.lora_qkv import lora_qkv
from sparktune.ops.weights import Weight
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.kernels(together=True)
K, N = 64, 96


def rand(device, *shape, dtype=torch.float32, seed=1, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def dense(device, n, k, seed=2, dtype=torch.float32):
    return Weight(rand(device, n, k, seed=seed, scale=k**-0.5, dtype=dtype), (n, k))


def adapter(device, n, k, r=4, seed=3, dtype=torch.float32):
    a, b = rand(device, r, k, seed=seed, scale=k**-0.5), rand(device, n, r, seed=seed + 50, scale=r**-0.5)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def peft_layer(device, n=N, k=K, *, bias=False, seed=0, **config):
    """PEFT's LoRA over bitsandbytes' Linear4bit, B not zero, and its base as a Weight."""
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    from sparktune.quant.cpu_repack import keep_layout

    keep_layout()
    torch.manual_seed(seed)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = bnb.nn.Linear4bit(k, n, bias=bias, quant_type="nf4", compute_dtype=torch.float32)

        def forward(self, x):
            return self.proj(x)

    config = {"r": 8, "lora_alpha": 16} | config
    model = peft.get_peft_model(Model().to(device), peft.LoraConfig(target_modules=["proj"], **config))
    layer = model.base_model.model.proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    return layer, Weight.of(layer.base_layer)


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def compare(mine, theirs, leaves, rtol=1e-4):
    """Losses and the gradients of `leaves` of two calls that give [..., N]."""
    results = []
    for call in (mine, theirs):
        y = call()
        loss = (y.float() ** 2).mean() + y.float().mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize(
    "config",
    [{}, {"r": 1}, {"r": 7}, {"r": 300}, {"use_rslora": True}, {"bias": True}],
    ids=["plain", "rank 1", "rank 7", "rank 300", "rslora", "bias"],
)
def test_it_is_pefts_lora_over_a_4_bit_layer(device, config):
    layer, weight = peft_layer(device, **config)
    assert weight.quantized
    a, b = factors(layer)
    x = rand(device, 3, 5, K).requires_grad_()
    scale = layer.scaling["default"]
    compare(lambda: lora_linear(x, weight, a, b, scale=scale, bias=layer.base_layer.bias), lambda: layer(x), [x, a, b])


def test_pefts_bias_of_b_is_a_bias_times_the_scale(device):
    layer, weight = peft_layer(device, lora_bias=True, bias=True)
    a, b = factors(layer)
    bias_b = layer.lora_B["default"].bias
    torch.nn.init.normal_(bias_b)
    x, scale = rand(device, 5, K), layer.scaling["default"]

    def mine():
        return lora_linear(x, weight, a, b, scale=scale, bias=layer.base_layer.bias + scale * bias_b)

    compare(mine, lambda: layer(x), [a, b, bias_b])


def test_an_mlp_of_pefts_layers(device):
    gate, up = (peft_layer(device, seed=s) for s in (1, 2))
    down = peft_layer(device, K, N, seed=3, r=5)
    layers, weights = zip(gate, up, down, strict=True)
    pairs = tuple(factors(layer) for layer in layers)
    scales = tuple(layer.scaling["default"] for layer in layers)
    x = rand(device, 4, K).requires_grad_()
    leaves = [x, *(t for pair in pairs for t in pair)]
    for name, act in (("silu", torch.nn.functional.silu), ("gelu_tanh", torch.nn.GELU("tanh"))):
        compare(
            lambda name=name: lora_mlp(x, weights, pairs, scales, activation=name),
            lambda act=act: layers[2](act(layers[0](x)) * layers[1](x)),
            leaves,
        )


def test_merged_projections_are_the_three_apart(device):
    sizes = (64, 16, 16)
    weights = tuple(dense(device, n, K, seed=n + i) for i, n in enumerate(sizes))
    pairs = tuple(adapter(device, n, K, r, seed=r) for n, r in zip(sizes, (4, 1, 9), strict=True))
    x, scales = rand(device, 2, 7, K).requires_grad_(), (0.5, 1.0, 3.0)
    each = [
        lambda w=w, p=p, s=s: lora_linear(x, w, *p, scale=s) for w, p, s in zip(weights, pairs, scales, strict=True)
    ]
    compare(
        lambda: torch.cat(lora_qkv(x, weights, pairs, scales), -1),
        lambda: torch.cat([f() for f in each], -1),
        [x, *(t for pair in pairs for t in pair)],
        rtol=1e-5,
    )


def test_results_of_merged_projections_are_views_of_one_tensor(device):
    weights = tuple(dense(device, n, K) for n in (64, 16, 16))
    q, k, v = lora_qkv(rand(device, 5, K), weights, (None, None, None))
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert [t.stride(0) for t in (q, k, v)] == [96] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_factors_over_16_bit_activations(device, dtype):
    x, (a, b) = rand(device, 6, K, dtype=dtype).requires_grad_(), adapter(device, N, K)
    y = lora_linear(x, dense(device, N, K, dtype=dtype), a, b)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (dtype, dtype, torch.float32, torch.float32)


def test_room_gives_what_its_absence_gives(device):
    w, pair = dense(device, N, K), adapter(device, N, K)
    x = rand(device, 2, 5, K)
    roomy = torch.nn.functional.pad(x, (0, 16))[..., :K]
    assert not roomy.is_contiguous()
    x, roomy = x.requires_grad_(), roomy.requires_grad_()
    both = [lora_linear(x, w, *pair), lora_linear(roomy, w, *pair, tail_free=True)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y, [t, *pair], torch.ones_like(y)) for y, t in zip(both, (x, roomy), strict=True)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [N // 2, 2 * N])
def test_too_little_room_is_no_room(device, k):
    """A rank over the columns that are there; x wide and narrow, since each has its own way round."""
    w, pair = dense(device, N, k), adapter(device, N, k, 20)
    buffer = rand(device, 5, k + 16)
    kept, x = buffer.clone(), buffer[:, :k]
    torch.testing.assert_close(
        lora_linear(x, w, *pair, tail_free=True), lora_linear(x.clone(), w, *pair), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(buffer, kept)


def test_the_last_row_of_a_buffer_cut_short_has_no_room(device):
    w, pair = dense(device, N, K), adapter(device, N, K)
    storage = rand(device, 3 * (K + 16) - 16)
    x = storage.as_strided((3, K), (K + 16, 1))
    y = lora_linear(x, w, *pair, tail_free=True)
    torch.testing.assert_close(y, lora_linear(x.clone(), w, *pair), rtol=1e-5, atol=1e-5)


class Products(TorchDispatchMode):
    """Counts the multiplications in matrix products, those in place too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name != "mm" else args[:2]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [48, 96])
def test_nothing_is_computed_for_what_takes_no_gradient(device, n):
    """dX takes M N K, with the LoRA's M R (N + K); dA and dB take M R K and M R N."""
    m, r = 10, 16
    x, w, (a, b) = rand(device, m, K), dense(device, n, K), adapter(device, n, K, r)

    def backward(*wanted):
        t = [t.detach().requires_grad_(on) for t, on in zip((x, a, b), wanted, strict=True)]
        y = lora_linear(t[0], w, *t[1:])
        with Products() as products:
            y.sum().backward()
        return products.count

    for_dx, dy_b, da, db = m * (n * K + r * K), m * r * n, m * r * K, m * r * n
    assert backward(True, True, True) == for_dx + dy_b + da + db
    assert backward(True, False, True) == for_dx + dy_b + db
    assert backward(True, False, False) == for_dx + dy_b
    assert backward(False, True, True) == dy_b + da + db
    assert backward(False, True, False) == dy_b + da


def test_an_mlp_keeps_neither_h_nor_weights(device):
    m, n, k, r = 8, 128, 64, 4
    weights = dense(device, n, k), dense(device, n, k, 3), dense(device, k, n, 4)
    pairs = adapter(device, n, k, r), adapter(device, n, k, r, 5), adapter(device, k, n, r, 6)
    given = {t.untyped_storage().data_ptr() for t in (*(w.data for w in weights), *(t for p in pairs for t in p))}
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in given:
            kept.append(t)
        return t

    x = rand(device, m, k).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_mlp(x, weights, pairs)
    assert sorted(t.numel() for t in kept) == sorted([m * k, m * 2 * n, m * 16, m * 16])


def test_an_mlp_holds_one_weight_buffer_at_a_time(device, monkeypatch):
    made = []

    def pack(*args, **kwargs):
        assert all(ref() is None for ref in made), "a buffer is still there when the next one is made"
        p = original(*args, **kwargs)
        made.append(weakref.ref(p))
        return p

    original = lora_packed.pack
    monkeypatch.setattr(lora_packed, "pack", pack)
    weights = dense(device, N, K), dense(device, N, K), dense(device, K, N)
    pairs = adapter(device, N, K), adapter(device, N, K), adapter(device, K, N)
    x = rand(device, 5, K).requires_grad_()
    lora_mlp(x, weights, pairs).sum().backward()
    assert len(made) == 4


def test_a_layer_without_lora_is_the_layer(device):
    w, x = dense(device, N, K), rand(device, 5, K).requires_grad_()
    y = lora_linear(x, w)
    assert torch.equal(y, x @ w.data.t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.data.sum(0).expand(5, K), rtol=1e-5, atol=1e-5)


def test_dropout_repeats_with_its_seed_and_only_then(device):
    w, pair, x = dense(device, N, K), adapter(device, N, K), rand(device, 9, K)

    def run(seed):
        torch.manual_seed(seed)
        return lora_linear(x, w, *pair, dropout=0.3)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    first, second = (lora_linear(x, w, *pair, dropout=0.3) for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_keeps_its_share_and_the_mean(device):
    k, n = 512, 512
    w = Weight(torch.zeros(n, k, device=device), (n, k))
    eye = torch.eye(k, device=device)  # with A and B the identity the result is the dropped input
    y = lora_linear(torch.ones(64, k, device=device), w, eye, eye, dropout=0.2)
    zero = float((y == 0).double().mean())
    assert abs(zero - 0.2) < 0.01 and abs(float(y.mean()) - 1) < 0.02
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1.25), rtol=1e-6, atol=0)
    columns, rows = (float((y == 0).double().mean(d).std()) for d in (0, 1))
    assert columns < 0.08 and rows < 0.03, "zeros cluster in rows or columns"


def test_dropout_leaves_the_base_layer_alone(device):
    w, (a, b) = dense(device, N, K), adapter(device, N, K)
    x = rand(device, 9, K)
    torch.testing.assert_close(
        lora_linear(x, w, a, torch.zeros_like(b), dropout=0.9), lora_linear(x, w), rtol=1e-5, atol=1e-5
    )


def test_calls_are_counted(device):
    dispatch.reset()
    x = rand(device, 3, K).requires_grad_()
    lora_linear(x, dense(device, N, K), *adapter(device, N, K)).sum().backward()
    way = "triton" if device.type == "cuda" else "interpreter"
    assert dispatch.watermarks()["lora_linear"][way] == 1
    assert dispatch.launches()["sparktune.ops.lora_packed.adapter_kernel"] == 2  # the buffer is made again


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (3, K + 1)}, "x must be"),
        ({"a": (4, K + 1)}, "A must be"),
        ({"b": (N, 5)}, "A must be"),
        ({"b": None}, "both A and B"),
        ({"bias": (N + 1,)}, "bias must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
    ],
)
def test_wrong_arguments_are_named(device, change, message):
    given = {"x": (3, K), "a": (4, K), "b": (N, 4)} | change
    made = {k: rand(device, *v) if isinstance(v, tuple) else v for k, v in given.items()}
    x, a, b = (made.pop(k) for k in "xab")
    with pytest.raises(ValueError, match=message):
        lora_linear(x, dense(device, N, K), a, b, **made)


def test_wrong_dtypes_and_activations_are_named(device):
    w, pair, x = dense(device, N, K), adapter(device, N, K), rand(device, 3, K)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        lora_linear(x.double(), w, *pair)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        lora_linear(x, w, pair[0].detach().double(), pair[1])
    with pytest.raises(ValueError, match="activation must be one of silu"):
        lora_mlp(x, (w, w, dense(device, K, N)), (None, None, None), activation="relu")
    with pytest.raises(ValueError, match="weights must be"):
        lora_mlp(x, (w, w, w), (None, None, None))


def test_dora_is_refused_by_name(device):
    with pytest.raises(NotImplementedError, match="DoRA"):
        lora_linear(rand(device, 3, K), dense(device, N, K), *adapter(device, N, K), dora_magnitude=rand(device, N))
