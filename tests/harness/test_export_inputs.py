"""Transformers with the inputs of its products rounded as llama.cpp rounds them beside quantised weights."""

import numpy as np
import pytest
import torch
from sparkproof.runners.export_inputs import RoundedInputs, blocks_of, in_8_bits


def test_a_block_of_32_is_q8_0_bit_for_bit():
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    x = torch.randn(7, 3, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 256)
    x[0, 0, :64] = 0
    want = dequantize(quantize(x.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(in_8_bits(x, 32).numpy(), want)


def test_a_block_of_256_has_one_scale_in_32_bits():
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    got = in_8_bits(x, 256)
    scale = x.unflatten(-1, (2, 256)).abs().amax(-1, keepdim=True) / 127
    steps = got.unflatten(-1, (2, 256)) / scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert ((got - x).unflatten(-1, (2, 256)).abs() <= scale * 0.5001).all() and not torch.equal(got, x)


def test_experts_in_one_parameter_take_what_their_checkpoint_has():
    kinds = {
        "l.0.mlp.experts.0.up_proj.weight": "Q5_K", "l.0.mlp.experts.1.up_proj.weight": "Q5_K",
        "l.0.mlp.gate.weight": "F32", "l.0.o_proj.weight": "Q8_0",
    }  # fmt: skip
    names = ["l.0.mlp.experts.gate_up_proj", "l.0.mlp.gate.weight", "l.0.o_proj.weight", "l.1.o_proj.weight"]
    assert list(blocks_of(names, kinds).values()) == [256, 0, 32, 0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = torch.nn.Module()
    made.linear = torch.nn.Linear(64, 16, bias=True)
    made.router = torch.nn.Linear(64, 4, bias=False)
    made.experts = torch.nn.Parameter(torch.randn(4, 64, 16))
    return made.requires_grad_(False)


def test_products_with_quantised_weights_take_rounded_inputs_and_no_others(model):
    x = torch.randn(5, 64)
    kinds = {"linear.weight": "Q4_0", "router.weight": "F32", "experts": "Q8_0"}
    near = in_8_bits(x, 32)
    want = [
        model.linear(near),
        model.router(x),
        near @ model.experts[2],
        torch.bmm(near.expand(4, 5, 64), model.experts),
    ]
    with RoundedInputs(model, kinds) as inputs:
        got = [model.linear(x), model.router(x), x @ model.experts[2], torch.bmm(x.expand(4, 5, 64), model.experts)]
    assert inputs.rounded == {"linear.weight", "experts"}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert not torch.equal(model.linear(x), got[0]), "afterwards products are as ever"


def test_a_mixture_of_experts_of_transformers_is_met_whole(tmp_path):
    from sparkproof.engines.tiny import tiny
    from transformers import AutoModelForCausalLM

    base = tiny("tiny:qwen3_moe@256", tmp_path).path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    kinds = {n: "F32" if n.endswith("mlp.gate.weight") else "Q4_K" for n in names}
    ids = torch.arange(12)[None]
    with torch.no_grad(), RoundedInputs(model, kinds) as inputs:
        rounded = model(ids).logits
    assert inputs.rounded == {n for n in names if not n.endswith(("mlp.gate.weight",))} - (
        set() if model.config.tie_word_embeddings else {"model.embed_tokens.weight"}
    )
    assert not torch.equal(rounded, model(ids).logits)
