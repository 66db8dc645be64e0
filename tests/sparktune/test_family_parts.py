"""What families have of their own beside a training step: images, refusals, norms that are not the family's."""

import copy

import pytest
import torch
from families import FAMILIES, build, step, tokens, twins, worst
from sparktune.models import patch_model, unpatch_model
from sparktune.models.projection import fallbacks, reset_fallbacks
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def no_fallbacks_yet():
    reset_fallbacks()
    yield
    reset_fallbacks()


@pytest.fixture
def changed(monkeypatch):
    """A family's tiny model with some of its configuration changed."""

    def make(family, **changes):
        name, own = FAMILIES[family]
        monkeypatch.setitem(FAMILIES, family, (name, {**own, **changes}))
        return build(family)

    return make


def a_picture(ids):
    ids = ids.clone()
    ids[0, 3:7] = 150
    kinds = (ids == 150).long()
    return {"input_ids": ids, "token_type_ids": kinds, "pixel_values": torch.randn(1, 3, 16, 16)}


def test_a_batch_with_an_image_runs_as_transformers_and_is_counted():
    theirs, ours = twins("gemma3-images")
    ids = tokens(1, 14, vocab=140)
    batch = {**a_picture(ids), "labels": ids}
    loss, grads = step(theirs, **batch)
    found, own = step(ours, **batch)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    distance, name = worst(own, grads)
    assert distance < 2e-5, name
    assert any("vision_tower" in n for n in grads), "the tower has LoRA too"
    assert list(fallbacks()) == ["the loss: the batch has images"]


def test_text_of_a_processor_has_kinds_of_tokens_and_stays_fused():
    theirs, ours = twins("gemma3-images")
    ids = tokens(1, 14, vocab=140)
    batch = {"input_ids": ids, "labels": ids, "token_type_ids": torch.zeros_like(ids)}
    expected, found = (step(m, **batch)[0] for m in (theirs, ours))
    assert found == pytest.approx(expected.item(), rel=1e-6)
    assert fallbacks() == {}


def test_generation_sees_an_image_as_transformers_does():
    model = build("gemma3-images")
    batch = a_picture(tokens(1, 14, vocab=140))
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    before = model.generate(**batch, **options)
    patch_model(model)
    assert torch.equal(model.generate(**batch, **options), before)


def test_only_the_text_model_attends_through_sparktune():
    model = build("gemma3-images")
    kinds = (model.config, model.config.vision_config, model.config.text_config)
    before = [c._attn_implementation for c in kinds]
    patch_model(model)
    assert [c._attn_implementation for c in kinds] == [*before[:2], "sparktune"]
    unpatch_model(model)
    assert [c._attn_implementation for c in kinds] == before


@pytest.mark.parametrize("family", ["gemma3", "phi3", "smollm3"])
def test_dropout_of_the_scores_is_refused_not_left_out(family, changed):
    model = changed(family, attention_dropout=0.1)
    patch_model(model)
    with torch.no_grad():
        model(tokens())
    with pytest.raises(NotImplementedError, match=r"no dropout: load with attention_dropout=0\.0"):
        model.train()(tokens())


def test_a_model_that_attends_both_ways_is_refused(changed):
    model = changed("gemma3", use_bidirectional_attention=True)
    patch_model(model)
    with pytest.raises(NotImplementedError, match="is causal; load bidirectional models with"):
        model(tokens(), use_cache=False)


def test_phi_layers_with_dropout_stay_as_they_are_and_are_listed(changed):
    model = changed("phi3", resid_pdrop=0.1)
    plain = copy.deepcopy(model)
    report = patch_model(model)
    reason = "add_rms_norm: its residual branches have dropouts of [0.1, 0.1]"
    assert report.left == {f"model.layers.{i}": reason for i in (0, 1)}
    losses = []
    for m in (plain.train(), model.train()):
        torch.manual_seed(0)
        losses.append(m(tokens(), labels=tokens()).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Doubled(nn.Module):
    """Somebody's wrapper around a norm, under which its weight isn't all that it does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("how", ["hook", "wrapper", "epsilon", "layer"])
def test_a_norm_that_does_more_than_its_weight_says_is_called(family, how):
    theirs = build(family)
    ours = copy.deepcopy(theirs)
    patch_model(ours)
    for model in (theirs, ours):
        first = model.model.layers[0]
        attention = first.self_attn
        if how == "hook":
            attention.q_norm.register_forward_hook(lambda module, args, out: 2 * out)
        elif how == "wrapper":
            attention.k_norm = Doubled(attention.k_norm)
        elif how == "epsilon":
            setattr(attention.q_norm, "eps" if family == "gemma3" else "variance_epsilon", 0.5)
        else:
            name = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
            setattr(first, name, Doubled(getattr(first, name)))
    with torch.no_grad():
        expected, found = (m(tokens(), use_cache=False).logits for m in (theirs, ours))
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())
    what = "a norm of a sum" if how == "layer" else "the norms of the heads"
    assert sum(n for why, n in fallbacks().items() if why.startswith(what)) == 1, fallbacks()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("hooked", ["self_attn", "rotary_emb", "layer", "mlp"])
def test_a_module_with_a_forward_of_its_own_leaves_a_model_that_is_right(family, hooked):
    theirs, ours = (build(family) for _ in range(2))
    first = ours.model.layers[0]
    module = {"rotary_emb": ours.model.rotary_emb, "layer": first}.get(hooked) or getattr(first, hooked)
    module.forward = module.forward  # as accelerate's hooks do
    report = patch_model(ours)
    name = {"rotary_emb": "model.rotary_emb", "layer": "model.layers.0"}.get(hooked, f"model.layers.0.{hooked}")
    assert "already replaced on the instance" in report.left[name]
    both = hooked in ("self_attn", "rotary_emb")
    assert bool(report.counts["rope"]) != both
    assert len(report.left) == (len(ours.model.layers) + 1 if both else 1)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]), "use_cache": False}
    ids = tokens(1, 12)
    with torch.no_grad():
        expected, found = (m(ids, **packed).logits for m in (theirs, ours))
        texts = [m.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True) for m in (theirs, ours)]
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())
    assert torch.equal(*texts)
    unpatch_model(ours)
    with torch.no_grad():
        assert torch.allclose(ours(ids, **packed).logits, expected, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("family", ["gemma2", "phi4-mini"])
def test_under_autocast_nothing_falls_back_and_the_residual_stays_fp32(family):
    theirs, ours = twins(family)
    batch = {"input_ids": tokens(), "labels": tokens()}
    exact, exact_grads = step(theirs, **batch)
    dtypes = []
    for layer in ours.get_base_model().model.layers:
        layer.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        (_, grads), (found, own) = (step(m, **batch) for m in (theirs, ours))
    assert dtypes == [torch.float32] * 2
    assert found == pytest.approx(exact.item(), rel=3e-3)
    for name, grad in exact_grads.items():
        norm = grad.norm()
        assert (own[name] - grad).norm() / norm <= 2 * (grads[name] - grad).norm() / norm + 8e-3, name
    assert fallbacks() == {}
