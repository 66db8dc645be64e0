"""A layer that was read stays read until something of it changes, whatever that is."""

import copy

import pytest
import torch
from families import build, with_lora
from peft import LoraConfig
from sparktune.models import patch_model
from sparktune.models.layer_parts import LayerParts, parts_of, stamp_of
from sparktune.models.projection import Unfit
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def untouched():
    found = with_lora(build("qwen3"))
    patch_model(found)
    return found.train()


@pytest.fixture
def model(untouched):
    return copy.deepcopy(untouched)


def layer_of(model):
    return model.get_base_model().model.layers[0]


def q(model):
    return layer_of(model).self_attn.q_proj


def set_on(path, name, value):
    """A change that sets an attribute of a part of the layer."""
    return lambda model: setattr(layer_of(model).get_submodule(path), name, value)


def exchanged(get):
    """A change that gives a parameter other memory, as `.to(...)` does."""

    def change(model):
        parameter = get(model)
        parameter.data = parameter.data.clone()

    return change


def grown(model):
    q(model).lora_A["default"].weight.data = torch.randn(7, 64)
    q(model).lora_B["default"].weight.data = torch.randn(64, 7)


def second(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["second"])


def dora(model):
    q(model).use_dora["default"] = True


def halved(model):
    q(model).scaling["default"] /= 2


def hooked(path):
    return lambda model: layer_of(model).get_submodule(path).register_forward_hook(lambda *a: None)


CHANGES = {
    "a hook on a projection": hooked("self_attn.q_proj"),
    "a hook before attention": lambda m: layer_of(m).self_attn.register_forward_pre_hook(lambda *a: None),
    "a hook on the MLP": hooked("mlp"),
    "a hook on a norm": hooked("post_attention_layernorm"),
    "a hook on the heads' norm": hooked("self_attn.q_norm"),
    "a hook of the backward": lambda m: q(m).register_full_backward_hook(lambda *a: None),
    "a forward of its own": set_on("mlp.up_proj", "forward", lambda x: x),
    "a trained weight": lambda m: q(m).base_layer.weight.requires_grad_(True),
    "a weight elsewhere": exchanged(lambda m: q(m).base_layer.weight),
    "another weight": lambda m: setattr(q(m).base_layer, "weight", nn.Parameter(torch.ones(64, 64), False)),
    "another bias": lambda m: setattr(q(m).base_layer, "bias", nn.Parameter(torch.ones(64), False)),
    "another projection": set_on("mlp", "gate_proj", nn.Linear(64, 96, bias=False).requires_grad_(False)),
    "another base layer": lambda m: setattr(q(m), "base_layer", nn.Linear(64, 64, bias=False).requires_grad_(False)),
    "no adapter": lambda m: m.base_model.disable_adapter_layers(),
    "a merged adapter": lambda m: m.merge_adapter(),
    "another adapter": second,
    "another scale": halved,
    "another A": lambda m: q(m).lora_A.update({"default": nn.Linear(64, 4, bias=False)}),
    "another rank": grown,
    "dropout": lambda m: q(m).lora_dropout.update({"default": nn.Dropout(0.3)}),
    "DoRA": dora,
    "a bias of LoRA": lambda m: setattr(q(m).lora_B["default"], "bias", nn.Parameter(torch.zeros(64))),
    "another norm": set_on("input_layernorm", "weight", nn.Parameter(torch.ones(64))),
    "another epsilon": set_on("post_attention_layernorm", "variance_epsilon", 1e-3),
    "the heads' epsilon": set_on("self_attn.k_norm", "variance_epsilon", 1e-3),
    "a window": set_on("self_attn", "sliding_window", 3),
    "another scale of scores": set_on("self_attn", "scaling", 0.5),
    "no positions": set_on("self_attn", "use_rope", False),
    "not causal": set_on("self_attn", "is_causal", False),
    "dropout of scores": set_on("self_attn", "attention_dropout", 0.5),
    "no training": lambda m: m.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_read_again_after(model, change):
    layer = layer_of(model)
    before, stamp = parts_of(layer), stamp_of(layer)
    assert parts_of(layer) is before
    CHANGES[change](model)
    assert stamp_of(layer) != stamp
    try:
        wanted = LayerParts.of(layer)
    except (Unfit, NotImplementedError) as why:
        with pytest.raises(type(why), match=str(why)[:20]):
            parts_of(layer)
    else:
        after = parts_of(layer)
        assert after is not before
        assert parts_of(layer) is after
        for found, read in zip(after.groups, wanted.groups, strict=True):
            assert (found.scales, found.stack.ranks) == (read.scales, read.stack.ranks)
            assert all(x is y for x, y in zip(found.factors, read.factors, strict=True))
        assert (after.window, after.scale, after.eps1, after.eps2) == (
            wanted.window,
            wanted.scale,
            wanted.eps1,
            wanted.eps2,
        )


def test_a_change_back_is_a_change(model):
    layer = layer_of(model)
    parts_of(layer)
    with model.disable_adapter():
        assert parts_of(layer).qkv.stack.r == 0
    assert parts_of(layer).qkv.stack.r == 16


def test_a_copy_is_read_for_itself_and_takes_nothing_along(model):
    layer = layer_of(model)
    mine = parts_of(layer)
    other = copy.deepcopy(layer)
    theirs = parts_of(other)
    assert theirs.norm1 is other.input_layernorm.weight
    assert theirs.qkv.a[0] is not mine.qkv.a[0]
    assert parts_of(layer) is mine


def test_a_latent_attention_has_no_stamp():
    model = build("deepseek_v3")
    patch_model(model)
    assert stamp_of(model.model.layers[0]) is None
    with pytest.raises(Unfit, match="its attention is a"):
        parts_of(model.model.layers[0])
