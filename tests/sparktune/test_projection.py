"""Projections and heads under PEFT: what is fused computes the same, what can't be is said and computes the same too."""

import copy
import logging

import pytest
import torch
from families import build, step, tokens, twins, with_lora, worst
from peft import LoHaConfig, get_peft_model
from sparktune.models import patch_model
from sparktune.models.causal import head
from sparktune.models.projection import Projection, Unfit, common_dropout, fallbacks, note_fallback, reset_fallbacks
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BATCH = {"input_ids": tokens(), "labels": tokens()}


@pytest.fixture(autouse=True)
def no_fallbacks_yet():
    reset_fallbacks()
    yield
    reset_fallbacks()


def same(theirs, ours, **batch):
    """Both models' loss and gradients are one; which are they."""
    loss, grads = step(theirs, **{**BATCH, **batch})
    found, own = step(ours, **{**BATCH, **batch})
    assert found == pytest.approx(loss.item(), rel=1e-6)
    distance, name = worst(own, grads)
    assert distance < 2e-5, name
    return own


def layer(model, name="q_proj"):
    """A projection of the first layer, as PEFT wrapped it."""
    return getattr(model.get_base_model().model.layers[0].self_attn, name)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True, "lora_alpha": 6}, {"bias": "all"}, {"rank_pattern": {"k_proj": 2}}, {"target_modules": ["v_proj"]}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_kinds_of_lora_that_are_fused(options):
    grads = same(*twins("qwen2", **options))
    assert fallbacks() == {}
    if "bias" in options:
        assert any(n.endswith("q_proj.base_layer.bias") for n in grads)


def test_a_disabled_adapter_is_left_out_and_fused():
    theirs, ours = twins("llama")
    with torch.no_grad():
        on = ours(**BATCH, use_cache=False).loss
        with theirs.disable_adapter(), ours.disable_adapter():
            expected, off = (m(**BATCH, use_cache=False).loss for m in (theirs, ours))
    assert off == pytest.approx(expected.item(), rel=1e-6)
    assert abs(off - on) > 1e-3
    assert fallbacks() == {}


def second(model):
    from peft import LoraConfig

    torch.manual_seed(5)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def merged(model):
    model.merge_adapter()


def doubled(model):
    layer(model).register_forward_hook(lambda module, args, out: 2 * out)


def trained(model):
    layer(model).base_layer.weight.requires_grad_(True)


def replaced(model):
    module = layer(model)
    module.forward = lambda x: x @ module.base_layer.weight.mT


UNFIT = {
    "several adapters": ({}, second, "2 adapters are active at once"),
    "DoRA": ({"use_dora": True}, None, "DoRA"),
    "merged": ({}, merged, "merged into the weight"),
    "hook": ({}, doubled, "hooks"),
    "own forward": ({}, replaced, "a forward of its own"),
    "trained weight": ({}, trained, "its weight is trained"),
    "LoRA with a bias": ({"lora_bias": True}, None, "its LoRA has a bias"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_no_product_says_runs_module_by_module_and_is_counted(case, caplog):
    options, change, reason = UNFIT[case]
    family = "qwen2" if case == "LoRA with a bias" else "llama"
    if case == "LoRA with a bias":
        options = {**options, "target_modules": ["q_proj"]}
    theirs, ours = twins(family, **options)
    for model in (theirs, ours):
        if change:
            change(model)
    with caplog.at_level(logging.WARNING, "sparktune"):
        if case == "merged":  # PEFT merges nothing that has a gradient
            losses = [m(**BATCH, use_cache=False).loss.item() for m in (theirs, ours)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        else:
            same(theirs, ours)
    found = [why for why in fallbacks() if why.startswith("q, k and v") and reason in why]
    assert found, fallbacks()
    assert any(reason in message for message in caplog.messages)


def test_different_dropouts_can_not_be_one_product():
    a, b = torch.ones(2, 4), torch.ones(3, 2)
    weight = Projection.of(nn.Linear(4, 3).requires_grad_(False)).weight
    none, some, other = (Projection(weight, None, a, b, 1.0, p) for p in (0.0, 0.1, 0.2))
    assert common_dropout(some, some, Projection(weight, None)) == 0.1
    assert common_dropout(Projection(weight, None)) == 0.0
    with pytest.raises(Unfit, match=r"different dropouts: \[0.0, 0.1\]"):
        common_dropout(none, some)
    with pytest.raises(Unfit, match="different dropouts"):
        common_dropout(other, some)


def test_dropout_holds_in_training_alone():
    model = with_lora(build("llama"), lora_dropout=0.25)
    patch_model(model)
    assert Projection.of(layer(model.train())).dropout == 0.25
    assert Projection.of(layer(model.eval())).dropout == 0.0
    layer(model.train()).lora_dropout["default"].p = 0.5
    model(**BATCH, use_cache=False).loss.backward()
    assert [why for why in fallbacks() if "different dropouts: [0.25, 0.5]" in why]


def test_what_is_not_a_linear_layer_with_a_matrix_of_floats_is_unfit():
    codes = nn.Linear(4, 3)
    codes.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    for module, reason in (
        (nn.Conv1d(4, 3, 1), "a Conv1d, not a linear layer"), (codes, "torch.int8"), (nn.Linear(4, 3), "trained"),
    ):  # fmt: skip
        with pytest.raises(Unfit, match=reason):
            Projection.of(module)


def test_an_adapter_of_another_kind_is_unfit_and_right():
    theirs = get_peft_model(build("llama"), LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    ours = copy.deepcopy(theirs)
    patch_model(ours)
    same(theirs.train(), ours.train())
    assert [why for why in fallbacks() if "not LoRA" in why]


def test_a_reason_is_said_once_and_counted_always(caplog):
    with caplog.at_level(logging.WARNING, "sparktune"):
        for _ in range(3):
            note_fallback("an op", "a reason")
    assert fallbacks() == {"an op: a reason": 3}
    assert caplog.messages == ["sparktune runs an op module by module: a reason."]
    fallbacks().clear()
    assert fallbacks(), "a copy"


HEADS = {
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "rsLoRA": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole, with the embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("family", ["llama", "gemma2"], ids=["untied", "tied and capped"])
@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_learns_is_fused_into_the_loss(case, family):
    grads = same(*twins(family, **HEADS[case]))
    learnt = [g for n, g in grads.items() if "lm_head" in n or "embed_tokens" in n]
    assert learnt and all(g.abs().max() > 0 for g in learnt)
    assert fallbacks() == {}


def test_tied_embeddings_trained_whole_get_both_parts_of_their_gradient():
    theirs = build("gemma2").train()
    ours = copy.deepcopy(theirs)
    for model in (theirs, ours):
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
    patch_model(ours)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    assert list(same(theirs, ours)) == ["model.embed_tokens.weight"]
    assert fallbacks() == {}


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"use_dora": True}, None, "DoRA"),
        ({"lora_dropout": 0.5}, None, "dropout"),
        ({}, lambda m: m.get_base_model().lm_head.register_forward_hook(lambda module, args, out: 2 * out), "hooks"),
        ({}, second, "2 adapters"),
    ],
    ids=["DoRA", "dropout", "hook", "several adapters"],
)
def test_a_head_that_can_not_be_fused_runs_as_transformers_and_is_counted(options, change, reason):
    theirs, ours = twins("llama", target_modules=["lm_head"], **options)
    for model in (theirs, ours):
        if change:
            change(model)
    if "lora_dropout" in options:
        assert torch.isfinite(step(ours, **BATCH)[0])
    else:
        same(theirs, ours)
    assert [why for why in fallbacks() if why.startswith("the loss") and reason in why], fallbacks()


def test_a_saved_head_switched_off_is_the_original():
    model = with_lora(build("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    module = model.get_base_model().lm_head
    assert head(module)[0] is module.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head(module)[0] is module.original_module.weight
