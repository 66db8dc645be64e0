"""Patching: what runs, what is left and why, that it can be undone, and that nothing else changes."""

import copy
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sparktune import FastLanguageModel
from sparktune.models import UnknownFamilyError, patch_model, unpatch_model
from sparktune.models.parts import Mlp, Norm
from sparktune.ops import dispatch
from sparktune.quant import cpu_repack
from sparktune.quant.linear import Linear4bit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

PATCHED = {
    "linear_cross_entropy": 1, "documents": 1, "add_rms_norm": 2, "lora_qkv": 2, "lora_mlp": 2, "rms_norm": 5, "rope": 1,
    "dequantize_4bit": 14,
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(**changes):
    return LlamaConfig(
        **{
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    for parameter in model.parameters():  # norms at 1 would hide a wrong weight
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def load(folder):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": DEVICE}
    )


def ids():
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def with_lora(model):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


def test_every_module_is_patched_and_its_op_runs(folder):
    model = load(folder)
    report = patch_model(model)
    assert report.counts == PATCHED
    assert report.left == {}
    dispatch.reset()
    model.train()(ids(), labels=ids())
    way = "triton" if DEVICE == "cuda" else ("interpreter" if dispatch.INTERPRETED else "reference")
    assert {op: counts[way] for op, counts in dispatch.watermarks().items()} == {
        "rms_norm": 3, "add_rms_norm": 2, "rope": 2, "lora_qkv": 2, "lora_linear": 2, "lora_mlp": 2,
        "linear_cross_entropy": 1,
    }  # fmt: skip


def test_loss_and_gradients_are_those_of_the_model_unpatched(folder):
    losses, grads = [], []
    for patched in (False, True):
        model = load(folder)
        if patched:
            patch_model(model)
        model = with_lora(model)
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 28
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        assert torch.allclose(grads[1][name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max())), name


def test_generation_is_the_same(folder):
    texts = []
    for patched in (False, True):
        model = load(folder)
        if patched:
            patch_model(model)
        texts.append(model.generate(ids()[:1], max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_undoing_gives_every_class_back_and_patching_twice_is_once(folder):
    model = load(folder)
    before = {name: type(module) for name, module in model.named_modules()}
    assert patch_model(model).counts == patch_model(model).counts
    assert unpatch_model(model) == sum(PATCHED.values())
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="not patched"):
        FastLanguageModel.report(model)


def test_another_model_in_the_process_stays_as_it_was(folder):
    one, other = load(folder), load(folder)
    patch_model(one)
    assert not any(isinstance(m, (Norm, Mlp, Linear4bit)) for m in other.modules())


def test_an_unknown_family_is_refused_not_ignored():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50))
    with pytest.raises(UnknownFamilyError, match=r"'gpt2'.*Families it knows: .*llama"):
        patch_model(model)


def test_what_can_not_be_patched_is_listed_with_its_reason(folder):
    model = load(folder)
    layer = model.model.layers[0]
    layer.mlp.act_fn = nn.GELU()
    layer.self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    layer.input_layernorm.forward = layer.input_layernorm.forward
    report = patch_model(model)
    assert report.left == {
        "model.layers.0.mlp": "lora_mlp: its activation is GELU, not silu",
        "model.layers.0.self_attn.q_proj": "dequantize_4bit: its weight was repacked for AVX512-BF16",
        "model.layers.0.input_layernorm": "rms_norm: its forward is already replaced on the instance",
    }
    assert report.counts == PATCHED | {"rms_norm": 4, "lora_mlp": 1, "dequantize_4bit": 13}
    assert "3 left" in str(report) or "left" in str(report)


def test_weights_that_are_not_quantised_yet_are_left():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    model = LlamaForCausalLM(config(num_hidden_layers=1))
    model.model.layers[0].self_attn.q_proj = layer
    assert patch_model(model).left == {
        "model.layers.0.self_attn.q_proj": "dequantize_4bit: its weight is not quantised yet"
    }


def test_the_fast_model_by_the_names_users_know(folder, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)
    model, _ = FastLanguageModel.from_pretrained(folder)
    model = FastLanguageModel.get_peft_model(model, r=4)
    assert FastLanguageModel.report(model).counts["dequantize_4bit"] == 14
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


class TestLinear4bit:
    @staticmethod
    def make(nested=True, bias=True, dtype=torch.float32, size=(96, 64)):
        torch.manual_seed(2)
        layer = bnb.nn.Linear4bit(
            size[1], size[0], bias=bias, quant_type="nf4", compress_statistics=nested, compute_dtype=dtype
        )
        layer = layer.to(dtype).to(DEVICE) if DEVICE == "cuda" else layer.to(dtype)
        if getattr(layer.weight, "quant_state", None) is None:
            layer.weight = layer.weight._quantize(DEVICE)
        layer.__class__ = Linear4bit
        return layer

    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_product_and_gradients_against_dequantised_torch(self, nested, dtype):
        layer = self.make(nested, dtype=dtype)
        layer.bias.requires_grad_(True)
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        x = torch.randn(2, 5, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        y = layer(x)
        expected = nn.functional.linear(x, weight, layer.bias)
        g = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, layer.bias), g)
        want = torch.autograd.grad(expected, (x, layer.bias), g)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        assert torch.allclose(y, expected, **tolerance)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, **tolerance)

    def test_it_computes_in_its_compute_dtype_and_returns_the_inputs(self):
        layer = self.make(bias=False, dtype=torch.bfloat16)
        x = torch.randn(3, 64, device=DEVICE)
        y = layer(x)
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)
        assert y.dtype == torch.float32
        assert torch.equal(y, nn.functional.linear(x.bfloat16(), weight).float())

    def test_saving_and_loading_are_bitsandbytes_own(self):
        layer = self.make()
        keys = set(layer.state_dict())
        layer.__class__ = bnb.nn.Linear4bit
        assert keys == set(layer.state_dict())
        assert copy.deepcopy(layer).weight.quant_state is not None


class TestRepacking:
    """bitsandbytes repacks in place on CPUs with AVX512-BF16; such a CPU is made believe here."""

    @pytest.fixture
    def believes(self, monkeypatch):
        import bitsandbytes.nn.modules as modules

        repacked = []
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)

        def convert(data, state):
            repacked.append(1)
            state.packing_format_for_cpu = True
            raise AssertionError("repacked")

        monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", convert)
        return repacked

    @staticmethod
    def layer():
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = layer.weight._quantize("cpu")
        return layer.eval()

    def test_without_the_cure_the_first_inference_repacks(self, believes):
        with pytest.raises(AssertionError, match="repacked"), torch.no_grad():
            self.layer()(torch.randn(2, 64))
        assert believes

    def test_with_the_cure_nothing_is_ever_repacked(self, believes):
        cpu_repack.keep_layout()
        layer = self.layer()
        before = layer.weight.data.clone()
        with torch.no_grad():
            layer(torch.randn(2, 64))
        assert not believes
        assert torch.equal(layer.weight.data, before)
        assert cpu_repack.assert_layout(nn.Sequential(layer)) == 1

    def test_a_layer_built_before_the_cure_is_refused(self, believes):
        layer = self.layer()
        cpu_repack.keep_layout()
        with pytest.raises(RuntimeError, match=r"0 would be repacked.*before the model is built"):
            cpu_repack.assert_layout(nn.Sequential(layer))

    def test_a_layer_that_was_repacked_is_refused_and_never_patched(self):
        layer = self.layer()
        layer.weight.quant_state.packing_format_for_cpu = True
        with pytest.raises(RuntimeError, match="0 was repacked"):
            cpu_repack.assert_layout(nn.Sequential(layer))

    def test_both_engines_apply_it_before_they_build(self, folder):
        """In a fresh process that believes itself on such a CPU, a generate leaves the weights as they were."""
        script = f"""
import sys, torch, bitsandbytes.nn.modules as modules
from pathlib import Path
believe = lambda: True
modules._convert_weight_packed_for_cpu = lambda *a: sys.exit("repacked")
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
folder = Path({str(folder)!r})
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)
from sparkproof.engines.base import LoadSpec
from sparkproof.engines.registry import engine
spec = LoadSpec(folder, True, 32, 4, 8.0, ("q_proj",), device="cpu")
for name in ("hf", "sparktune"):
    modules.has_avx512bf16 = believe
    model, tokenizer = engine(name).load(spec)
    with torch.no_grad():
        model.eval()(torch.tensor([[1, 2, 3]]))
    print(name, "kept")
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == ["hf", "kept", "sparktune", "kept"]
