"""Experts where they differ from other layers: frozen, empty, in 4 bits, and what can't run inside the product."""

import copy

import pytest
import torch
from families import EXPERTS, FAMILIES, build, choices, routers, step, tokens, with_lora, worst
from sparktune.models import patch_model
from sparktune.models.projection import fallbacks, reset_fallbacks
from sparktune.ops import dispatch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
ATTENTION = ["q_proj", "o_proj"]
MIXED = [f for f in FAMILIES if routers(build(f))]
mixed = pytest.mark.parametrize("family", MIXED)


def batch():
    return {"input_ids": tokens(), "labels": tokens()}


def pair(family="qwen3_moe", **options):
    plain = with_lora(build(family), **options)
    ours = copy.deepcopy(plain)
    return plain.train(), ours.train(), patch_model(ours)


@mixed
def test_experts_without_tokens_have_no_gradient_and_the_others_transformers(family):
    theirs, ours, _ = pair(family)
    few = tokens(1, 3)
    with choices(ours) as chosen:
        found, own = step(ours, input_ids=few, labels=few)
    loss, grads = step(theirs, input_ids=few, labels=few)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    assert worst(own, grads)[0] < 1e-5
    last, experts = chosen[-1][:-1], routers(ours)[-1].num_experts  # the last token predicts nothing
    hit = torch.bincount(last.flatten(), minlength=experts) > 0
    assert last.shape[1] > 1
    assert 1 < hit.sum() <= last.numel() < experts
    name = next(n for n in reversed(own) if "mlp.experts.lora_A" in n)
    assert torch.equal(own[name].view(experts, -1).abs().amax(1) > 0, hit)


@mixed
def test_frozen_experts_pass_gradients_on(family):
    theirs, ours, report = pair(family, target_modules=ATTENTION, target_parameters=[])
    assert report.counts["moe_mlp"] == len(routers(ours))
    loss, grads = step(theirs, **batch())
    dispatch.reset()
    reset_fallbacks()
    found, own = step(ours, **batch())
    assert found == pytest.approx(loss.item(), rel=1e-6)
    assert worst(own, grads)[0] < 1e-5
    assert not fallbacks()
    counts = dispatch.watermarks()
    assert sum(counts["grouped_lora"].values()) == 2 * len(routers(ours))
    assert sum(counts["moe_combine"].values()) == len(routers(ours))


@mixed
def test_trained_whole_they_get_the_gradients_of_transformers(family):
    theirs = build(family).train().requires_grad_(True)
    ours = copy.deepcopy(theirs)
    patch_model(ours)
    loss, grads = step(theirs, **batch())
    found, own = step(ours, **batch())
    assert found == pytest.approx(loss.item(), rel=1e-6)
    assert grads.keys() == own.keys()
    assert any("gate_up_proj" in name for name in grads)
    assert worst(own, grads)[0] < 2e-5


class TestAdapters:
    def test_disabled_they_add_nothing_and_merged_they_stay(self):
        _, ours, _ = pair(target_modules=ATTENTION)
        ours.eval()
        ids = tokens()
        with torch.no_grad():
            with_it = ours(ids).logits
            with ours.disable_adapter():
                without = ours(ids).logits
            plain = build("qwen3_moe")(ids).logits
            ours.merge_adapter()
            merged = ours(ids).logits
            ours.unmerge_adapter()
            again = ours(ids).logits
        assert torch.allclose(without, plain, atol=1e-4)
        assert not torch.allclose(with_it, plain, atol=1e-1)
        assert torch.allclose(merged, with_it, atol=1e-3)
        assert torch.allclose(again, with_it, atol=1e-3)

    def test_several_at_once_run_as_peft_has_them_and_say_so(self):
        theirs = with_lora(build("qwen3_moe"), target_modules=ATTENTION)
        theirs.add_adapter("second", copy.deepcopy(theirs.peft_config["default"]))
        theirs.base_model.set_adapter(["default", "second"])
        ours = copy.deepcopy(theirs)
        patch_model(ours)
        reset_fallbacks()
        loss, grads = step(theirs.train(), **batch())
        found, own = step(ours.train(), **batch())
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert worst(own, grads)[0] < 1e-5
        assert fallbacks()["the experts: 2 adapters are active at once"] == 2

    def test_a_hook_on_the_experts_is_called(self):
        _, ours, _ = pair(target_modules=ATTENTION)
        called = []
        routers(ours)  # the block, the router and the experts stay modules of their own
        experts = next(m for n, m in ours.named_modules() if n.endswith("layers.0.mlp.experts"))
        experts.register_forward_hook(lambda *a: called.append(1))
        reset_fallbacks()
        step(ours, **batch())
        assert called == [1]
        assert "hooks" in next(iter(fallbacks()))

    def test_the_routers_own_loss_is_transformers(self):
        theirs, ours, _ = pair(target_modules=ATTENTION)
        reset_fallbacks()
        loss, grads = step(theirs, output_router_logits=True, **batch())
        found, own = step(ours, output_router_logits=True, **batch())
        assert loss > step(theirs, **batch())[0]
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert worst(own, grads)[0] < 1e-5
        assert fallbacks() == {"the loss: the router's loss was asked for": 1}


def test_another_activation_or_class_is_left_with_its_reason():
    model = build("qwen3_moe")
    model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
    model.model.layers[2].mlp.experts = torch.nn.Identity()
    assert patch_model(model).left == {
        "model.layers.0.mlp": "moe_mlp: its activation is GELU, not silu",
        "model.layers.2.mlp": "moe_mlp: its experts are Identity, not Qwen3MoeExperts",
    }


def test_a_router_with_noise_is_left():
    model = build("mixtral")
    model.model.layers[1].mlp.jitter_noise = 0.1
    assert patch_model(model).left == {"model.layers.1.mlp": "moe_mlp: its router has jitter noise of 0.1"}


def test_what_peft_targets_is_what_the_families_name():
    theirs = with_lora(build("qwen3_moe"), target_modules=ATTENTION)
    names = {
        n.rpartition(".lora_")[0].rpartition(".layers.")[2] for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert {f"0.{EXPERTS[0].rpartition('.')[0]}", "0.mlp.experts.base_layer", "2.mlp.experts"} <= names
