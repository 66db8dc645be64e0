"""Experts in 4 bits: their products and gradients, adapters that load over 16 bits too, and checkpoints in MXFP4."""

import contextlib
import copy
import logging
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from families import build, routers, step, tokens, with_lora, worst
from safetensors.torch import save_file
from sparktune import FastLanguageModel
from sparktune.models import experts, patch_model
from sparktune.models.projection import fallbacks, reset_fallbacks
from sparktune.quant.experts import STACKS, as_plain, is_quantised, quantise_experts, stacks_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
FAMILIES = ("qwen3_moe", "gpt_oss")  # stored [E, N, K], and [E, K, N] with biases
ATTENTION = ["q_proj", "o_proj"]


def pair(family, **options):
    """(transformers' model with dense experts that 4 bits can say, ours with them in 4 bits), both with the same LoRA."""
    ours = build(family)
    plain = copy.deepcopy(ours)
    assert quantise_experts(ours) == 2 * len(routers(ours))
    for dense, packed in zip(stacks_of(plain), stacks_of(ours), strict=True):
        for name in STACKS:
            part = packed.parametrizations[name]
            assert part.original.dtype == torch.uint8
            getattr(dense, name).data = dequantize_4bit(part.original, part[0].quant_state)
    with as_plain(ours):
        ours = with_lora(ours, **options)
    patch_model(ours)
    return with_lora(plain, **options).train(), ours.train()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_the_weights_that_4_bits_say(family, adapted):
    theirs, ours = pair(family, target_modules=ATTENTION, **({} if adapted else {"target_parameters": []}))
    batch = {"input_ids": tokens(), "labels": tokens()}
    reset_fallbacks()
    for _ in range(2):  # nothing may pile up
        loss, grads = step(theirs, **batch)
        found, own = step(ours, **batch)
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert worst(own, grads)[0] < 1e-5
    assert any("experts" in name for name in grads) == adapted
    assert not fallbacks()
    assert sum(is_quantised(m) for m in ours.modules()) == len(routers(ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_have_the_same_names_and_shapes_as_over_16_bits(family):
    theirs, ours = pair(family, target_modules=ATTENTION)
    shapes = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]


def test_two_adapters_at_once_are_refused_since_peft_would_pile_them_up():
    _, ours = pair("qwen3_moe", target_modules=ATTENTION)
    with as_plain(ours):
        ours.add_adapter("second", copy.deepcopy(ours.peft_config["default"]))
    ours.base_model.set_adapter(["default", "second"])
    with pytest.raises(NotImplementedError, match=r"2 adapters are active.*one LoRA adapter"):
        ours(tokens())


def test_what_is_dequantised_is_dropped_after_the_forward_and_made_again_for_backward():
    values = torch.randn(3, 4, 5)
    made = []

    def make():
        made.append(1)
        return values.clone()

    dense, x = make(), torch.randn(3, 2, 4, requires_grad=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(experts._made_again(dense, make))
        y = x @ dense
        z = (x @ x.transpose(1, 2)).sum()  # saves other tensors as they are
    gone = weakref.ref(dense)
    del dense
    assert gone() is None
    (y.sum() + z).backward()
    want = torch.ones(3, 2, 5) @ values.transpose(1, 2)
    extra = torch.autograd.grad((x @ x.transpose(1, 2)).sum(), x)[0]
    assert torch.allclose(x.grad, want + extra)
    assert len(made) == 2


@pytest.fixture
def folder(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    return tmp_path


def test_the_fast_model_stores_experts_in_4_bits_trains_and_reloads_them(folder, tmp_path):
    build("qwen3_moe").save_pretrained(folder)
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=64)
    assert sum(is_quantised(m) for m in model.modules()) == 2
    assert FastLanguageModel.report(model).counts["moe_mlp"] == 2
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear", init_lora_weights=False)
    assert any("experts" in n for n, p in model.named_parameters() if p.requires_grad)
    reset_fallbacks()
    loss, grads = step(model, input_ids=tokens(), labels=tokens())
    assert all(g.abs().max() > 0 for g in grads.values())
    assert not fallbacks()
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", max_seq_length=64)
    assert step(again, input_ids=tokens(), labels=tokens())[0] == pytest.approx(loss.item(), rel=1e-6)


class TestMxfp4:
    """A tiny checkpoint as OpenAI's are stored: sixteen values, two a byte, and an exponent for 32 of them."""

    VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    @pytest.fixture
    def stored(self, folder):
        model = build("gpt_oss")
        model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        tensors, dense = model.state_dict(), {}
        g = torch.Generator().manual_seed(5)
        for name in [n for n in tensors if n.endswith(STACKS)]:
            e, k, n = tensors.pop(name).shape
            k = 64  # blocks of 32
            blocks = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8, generator=g)
            scales = torch.randint(122, 126, (e, n, k // 32), dtype=torch.uint8, generator=g)
            nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
            signed = torch.cat((self.VALUES, -self.VALUES))[nibbles]
            dense[name] = (signed * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        model.config.save_pretrained(folder)
        return folder, dense

    @pytest.mark.parametrize("four_bit", [False, True])
    def test_it_is_dequantised_and_says_so(self, stored, four_bit, caplog):
        folder, dense = stored
        with caplog.at_level(logging.WARNING, "sparktune"):
            model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=64, load_in_4bit=four_bit)
        assert "dequantised to 16 bits" in caplog.text
        assert ("stored as NF4" in caplog.text) == four_bit
        assert FastLanguageModel.report(model).counts["moe_mlp"] == 2
        assert sum(is_quantised(m) for m in model.modules()) == (2 if four_bit else 0)
        for name, value in dense.items():
            module, _, stack = name.rpartition(".")
            found = getattr(model.get_submodule(module), stack).float()
            assert found.shape == value.shape
            assert torch.equal(found, value) or four_bit
            assert (found - value).norm() < 0.15 * value.norm()
        model = FastLanguageModel.get_peft_model(model, r=4, target_modules=ATTENTION)
        assert step(model, input_ids=tokens(), labels=tokens())[0].isfinite()

    def test_loaded_by_transformers_alone_the_packed_experts_are_left_with_the_fix(self):
        model = build("gpt_oss")
        kind = type("Mxfp4GptOssExperts", (torch.nn.Identity,), {})
        model.model.layers[0].mlp.experts = kind()
        assert patch_model(model).left["model.layers.0.mlp"].endswith("Mxfp4Config(dequantize=True)")
