"""A mixture of experts: it is transformers' experts and PEFT's LoRA on them, and what is asked of each op."""

import pytest
import torch
from sparktune.ops import dispatch
from sparktune.ops.grouped_lora import grouped_lora
from sparktune.ops.moe_combine import moe_combine
from sparktune.ops.moe_mlp import ExpertLinear, moe_mlp, peft_factors
from sparktune.ops.moe_permute import moe_permute
from sparktune.ops.moe_routing import moe_route

pytestmark = pytest.mark.kernels(together=True)
T, K, N, E, R = 9, 32, 24, 4, 3


def rand(device, *shape, seed=1, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def experts_of(device, name):
    """(transformers' module of experts with random weights, our two layers of it, activation)."""
    common = {
        "hidden_size": K,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
    }
    if name == "qwen3":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

        module = Qwen3MoeExperts(Qwen3MoeConfig(moe_intermediate_size=N, num_experts=E, **common))
    elif name == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

        module = MixtralExperts(MixtralConfig(intermediate_size=N, num_local_experts=E, **common))
    else:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

        module = GptOssExperts(GptOssConfig(intermediate_size=N, num_local_experts=E, **common))
    module.to(device)
    for i, parameter in enumerate(module.parameters()):
        parameter.data = rand(device, *parameter.shape, seed=i, scale=0.3)
    if name == "gpt-oss":
        layers = (
            ExpertLinear(module.gate_up_proj.transpose(1, 2), bias=module.gate_up_proj_bias),
            ExpertLinear(module.down_proj.transpose(1, 2), bias=module.down_proj_bias),
        )
        return module, layers, "clamped"
    return module, (ExpertLinear(module.gate_up_proj), ExpertLinear(module.down_proj)), "silu"


def choice(device, t=T, top_k=2, experts=E, seed=5):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, experts, generator=g)
    weights, indices = torch.topk(logits.softmax(-1), top_k)
    return indices.to(device), weights.to(device)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt-oss"])
def test_it_is_transformers_experts(device, name):
    module, layers, activation = experts_of(device, name)
    indices, weights = choice(device)
    leaves = [rand(device, T, K, seed=3).requires_grad_(), weights.requires_grad_(), *module.parameters()]
    dy = rand(device, T, K, seed=4)
    mine = moe_mlp(leaves[0], indices, weights, *layers, activation=activation)
    theirs = module(leaves[0], indices, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(mine, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_it_is_pefts_lora_of_experts(device):
    peft = pytest.importorskip("peft")
    module, _, _ = experts_of(device, "qwen3")
    parts = torch.nn.ModuleDict({"experts": module})
    config = peft.LoraConfig(
        r=R, lora_alpha=6, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = peft.get_peft_model(parts, config)
    outer = model.base_model.model["experts"]
    inner = outer.base_layer
    pairs = {w.parameter_name: w for w in (outer, inner)}
    layers = []
    for key in ("gate_up_proj", "down_proj"):
        wrapper = pairs[key]
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        torch.nn.init.normal_(b, std=0.2)
        weight = getattr(module, key).detach().clone()  # PEFT adds its branch to the weight in place while it runs
        layers.append(ExpertLinear(weight, *peft_factors(a, b, E), scale=wrapper.scaling["default"]))
    leaves = [rand(device, T, K, seed=3).requires_grad_()]
    leaves += [p for p in model.parameters() if p.requires_grad]
    assert len(leaves) == 5
    indices, weights = choice(device)
    mine, theirs = moe_mlp(leaves[0], indices, weights, *layers), outer(leaves[0], indices, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    dy = rand(device, T, K, seed=4)
    for a, b in zip(torch.autograd.grad(mine, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def layer(device, seed=7, dtype=torch.float32):
    w = rand(device, E, N, K, seed=seed, scale=K**-0.5, dtype=dtype)
    a, b = rand(device, E, R, K, seed=seed + 1, scale=K**-0.5), rand(device, E, N, R, seed=seed + 2)
    return w, a.requires_grad_(), b.requires_grad_()


def test_reading_through_the_routing_is_permuting_first(device):
    indices, _ = choice(device)
    w, a, b = layer(device)
    x = rand(device, T, K).requires_grad_()
    z, (offsets, rows, positions) = moe_permute(x, indices, E)
    apart = grouped_lora(z, w, offsets, a, b, scale=2.0)
    inside = grouped_lora(x, w, offsets, a, b, scale=2.0, rows=rows, positions=positions)
    assert torch.equal(apart, inside)
    dy = rand(device, *apart.shape, seed=9)
    for one, other in zip(*(torch.autograd.grad(y, [x, a, b], dy) for y in (apart, inside)), strict=True):
        assert torch.equal(one, other)


def test_only_what_asks_gets_a_gradient(device):
    indices, _ = choice(device)
    offsets, rows, positions = moe_route(indices, E)
    w, a, b = layer(device)
    x = rand(device, T, K)
    dispatch.reset()
    grouped_lora(x, w, offsets, a, b.detach(), rows=rows, positions=positions).sum().backward()
    found = {k.rsplit(".", 1)[1]: n for k, n in dispatch.launches().items()}
    assert found["grouped_kernel"] == 3 and found["outer_kernel"] == 1  # t, y, u; and dA
    assert b.grad is None and w.grad is None and a.grad is not None


def test_calls_are_counted_and_never_fall_back(device):
    _, layers, activation = experts_of(device, "qwen3")
    dispatch.reset()
    indices, weights = choice(device)
    moe_mlp(rand(device, T, K), indices, weights, *layers, activation=activation)
    way = "triton" if device.type == "cuda" else "interpreter"
    counts = dispatch.watermarks()
    assert {k: v[way] for k, v in counts.items()} == {"moe_route": 1, "grouped_lora": 2, "swiglu": 1, "moe_combine": 1}


def test_gradients_are_in_their_own_dtypes(device):
    indices, weights = choice(device)
    offsets, rows, positions = moe_route(indices, E)
    w, a, b = layer(device, dtype=torch.bfloat16)
    x = rand(device, T, K, dtype=torch.bfloat16).requires_grad_()
    bias = rand(device, E, N).requires_grad_()
    w.requires_grad_()
    weights.requires_grad_()
    z = grouped_lora(x, w, offsets, a, b, bias=bias, rows=rows, positions=positions)
    y = moe_combine(z, weights, positions)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype, a.grad.dtype, bias.grad.dtype, weights.grad.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (T, K + 1)}, "x must be"),
        ({"w": (E, N)}, "W must be"),
        ({"a": (E, R, K + 1)}, "A must be"),
        ({"b": (E, N, R + 1)}, "A must be"),
        ({"b": None}, "both A and B"),
        ({"bias": (N,)}, "bias must be"),
        ({"positions": None}, "both rows and positions"),
    ],
)
def test_wrong_arguments_are_named(device, change, message):
    offsets, rows, positions = moe_route(choice(device)[0], E)
    given = {"x": (T, K), "w": (E, N, K), "a": (E, R, K), "b": (E, N, R), "bias": (E, N)} | change
    given = {"rows": rows, "positions": positions} | given
    made = {k: rand(device, *v) if isinstance(v, tuple) else v for k, v in given.items()}
    x, w, a, b = (made.pop(k) for k in "xwab")
    with pytest.raises(ValueError, match=message):
        grouped_lora(x, w, offsets, a, b, **made)


def test_wrong_routings_are_named(device):
    indices, weights = choice(device)
    x = rand(device, T, K)
    offsets, _, positions = moe_route(indices, E)
    with pytest.raises(ValueError, match="int32 or int64"):
        moe_route(indices.float(), E)
    with pytest.raises(ValueError, match="expert at least"):
        moe_route(indices, 0)
    with pytest.raises(ValueError, match="x must be"):
        moe_permute(x[1:], indices, E)
    with pytest.raises(ValueError, match="offsets must be"):
        grouped_lora(x, rand(device, E, N, K), offsets.long())
    with pytest.raises(ValueError, match="z must be"):
        moe_combine(x, weights, positions)
    with pytest.raises(ValueError, match="positions int32"):
        moe_combine(rand(device, 2 * T, K), weights, positions.long())
    w = ExpertLinear(rand(device, E, N, K))
    with pytest.raises(ValueError, match="activation must be one of silu"):
        moe_mlp(x, indices, weights, w, w, activation="relu")
    with pytest.raises(ValueError, match="peft_factors"):
        peft_factors(rand(device, 7, K), rand(device, N, 7), E)
