"""FastLanguageModel: Unsloth's names and defaults, what is refused, and that the model stays transformers' and PEFT's."""

import copy
import inspect
import logging
import os
import subprocess
import sys

import bitsandbytes as bnb
import export_tiny
import pytest
import torch
from peft import PeftModel
from sparktune import FastLanguageModel, is_bfloat16_supported
from sparktune.interface import choices, loading
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

CPU = {"": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny", attention_bias=True)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return export_tiny.save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora")


def load(base, **changes):
    settings = {"max_seq_length": 64, "load_in_4bit": False, "device_map": CPU, **changes}
    return FastLanguageModel.from_pretrained(base, **settings)


def lora(base, **changes):
    return FastLanguageModel.get_peft_model(load(base)[0], **{"r": 4, **changes})


def ids():
    return torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(3))


def test_importing_sparktune_loads_nothing():
    script = (
        "import sys, sparktune\n"
        "heavy = {'torch', 'transformers', 'peft', 'triton', 'bitsandbytes', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'FastLanguageModel' in dir(sparktune)\n"
        "from sparktune import FastLanguageModel\n"
        "assert 'trl' not in sys.modules and FastLanguageModel.__name__ == 'FastLanguageModel'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        (
            "from_pretrained",
            {
                "max_seq_length": 2048,
                "dtype": None,
                "load_in_4bit": True,
                "load_in_8bit": False,
                "full_finetuning": False,
                "token": None,
                "device_map": "sequential",
                "rope_scaling": None,
                "fix_tokenizer": True,
                "trust_remote_code": False,
                "use_gradient_checkpointing": "unsloth",
                "resize_model_vocab": None,
                "revision": None,
            },
        ),
        (
            "get_peft_model",
            {
                "r": 16,
                "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "lora_alpha": 16,
                "lora_dropout": 0.0,
                "bias": "none",
                "layers_to_transform": None,
                "layers_pattern": None,
                "use_gradient_checkpointing": "unsloth",
                "random_state": 3407,
                "use_rslora": False,
                "modules_to_save": None,
                "init_lora_weights": True,
            },
        ),
    ],
)
def test_names_order_and_defaults_are_those_users_know(method, defaults):
    found = inspect.signature(getattr(FastLanguageModel, method)).parameters
    assert {name: found[name].default for name in defaults} == defaults
    assert [name for name in found if name in defaults] == list(defaults)


def test_a_sixteen_bit_base_with_lora_is_peft_over_transformers(base):
    model, tokenizer = load(base, dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.bfloat16
    assert type(model).__name__ == "LlamaForCausalLM", "what save_pretrained writes and Trainer goes by"
    assert (model.max_seq_length, tokenizer.model_max_length, tokenizer.padding_side) == (64, 64, "right")
    wrapped = FastLanguageModel.get_peft_model(model, r=4)
    assert isinstance(wrapped, PeftModel) and wrapped.max_seq_length == 64
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all("lora_" in n for n in trained)
    assert FastLanguageModel.report(wrapped).counts["rms_norm"] == 5


def test_four_bits_are_the_default_and_full_finetuning_switches_them_off(base):
    four, _ = load(base, load_in_4bit=True)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in four.modules()) == 14
    assert four.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    whole, _ = load(base, load_in_4bit=True, full_finetuning=True)
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in whole.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in whole.parameters())
    with pytest.raises(ValueError, match="full_finetuning=True, which trains every weight"):
        FastLanguageModel.get_peft_model(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_8bit": True}, "use load_in_4bit=True"),
        ({"load_in_16bit": True, "load_in_4bit": True}, "load_in_4bit=False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"config\.json"),
        ({"resize_model_vocab": 600}, "resize_token_embeddings"),
        ({"attn_implementation": "eager"}, "sparktune's own: leave it out"),
        ({"fast_inference": True}, "serve it with vLLM"),
        ({"float32_mixed_precision": True}, "dtype=torch.float32"),
        ({"random_state": 1}, "give it to get_peft_model"),
        ({"offload_embedding": True}, "for a GPU only, not for cpu"),
        ({"offload_embedding": True, "full_finetuning": True}, "exclude each other"),
        ({"offload_embedding": "disk"}, "True, False or 'auto'"),
        ({"dtype": torch.float64}, "torch.bfloat16"),
        ({"dtype": "int8"}, "torch.bfloat16"),
        ({"max_seq_length": 4096}, "context of 512: use 512 or less"),
        ({"max_seq_length": 0}, "use 1 or more"),
        ({"device_map": {"model.embed_tokens": "cpu", "": "disk"}}, "whole on one device"),
        ({"device_map": "balanced"}, "is not a device"),
        ({"device_map": "meta"}, "use 'cuda' or 'cpu'"),
        ({"use_gradient_checkpointing": "offload"}, "'unsloth' or 'sparktune'"),
        ({"use_gradient_checkpointing": 1}, "'unsloth' or 'sparktune'"),
    ],
)
def test_from_pretrained_refuses_with_the_fix(base, changes, message):
    with pytest.raises(ValueError, match=message):
        load(base, **changes)


def test_an_argument_nobody_knows_is_an_error(base):
    with pytest.raises(TypeError, match=r"'load_in_5bit': leave it out.*attn_implementation"):
        load(base, load_in_5bit=True)
    model, _ = load(base, load_in_8bit=False, fast_inference=False)
    with pytest.raises(TypeError, match="'loraalpha'"):
        FastLanguageModel.get_peft_model(model, loraalpha=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "use 1 or more"),
        ({"target_modules": ["q_proj", "query"]}, "no module named 'query'.*down_proj"),
        ({"modules_to_save": ["classifier"]}, "no module named 'classifier'"),
        ({"max_seq_length": 128}, "give it to from_pretrained"),
        ({"temporary_location": "elsewhere"}, "nothing is offloaded"),
        ({"qat_scheme": "int4"}, "quantise the merged model"),
        ({"use_gradient_checkpointing": None}, "'unsloth' or 'sparktune'"),
    ],
)
def test_get_peft_model_refuses_with_the_fix(base, changes, message):
    with pytest.raises(ValueError, match=message):
        lora(base, **changes)


def test_lora_settings_reach_peft(base):
    model = lora(
        base,
        lora_alpha=8,
        lora_dropout=0.1,
        bias="lora_only",
        use_rslora=True,
        layers_to_transform=[1],
        target_modules=["q_proj", "lm_head"],
        loftq_config={},
        use_dora=True,
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0.1, "lora_only")
    assert (config.use_rslora, config.use_dora, config.layers_to_transform) == (True, True, [1])
    assert (set(config.target_modules), list(config.modules_to_save)) == ({"q_proj"}, ["lm_head"])
    layers = model.base_model.model.model.layers
    assert not hasattr(layers[0].self_attn.q_proj, "lora_A")
    assert layers[1].self_attn.q_proj.scaling["default"] == 8 / 4**0.5
    with pytest.raises(ValueError, match="LoRA layers already"):
        FastLanguageModel.get_peft_model(model)


def test_random_state_decides_how_lora_starts_and_nothing_else(base):
    def start(seed):
        torch.manual_seed(5)
        model = lora(base, random_state=seed)
        return model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight, torch.rand(1)

    (one, after), (again, _), (other, after_other) = start(1), start(1), start(2)
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(5)
    load(base)
    assert torch.equal(after, after_other)


def test_an_adapter_folder_comes_back_ready_to_go_on(base, adapter):
    model, tokenizer = load(adapter)
    assert isinstance(model, PeftModel) and len(tokenizer)
    assert sum(p.requires_grad for p in model.parameters()) == 28
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids()).logits, stock.eval()(ids()).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is a LoRA adapter"):
        load(adapter, full_finetuning=True)


def test_a_checkpoint_stored_in_four_bits_computes_in_the_asked_dtype(base, tmp_path):
    load(base, load_in_4bit=True, dtype=torch.bfloat16)[0].save_pretrained(tmp_path / "four")
    export_tiny.make_tokenizer().save_pretrained(tmp_path / "four")
    model, _ = load(tmp_path / "four", load_in_4bit=True, dtype=torch.float32)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert FastLanguageModel.report(model).counts["dequantize_4bit"] == 14
    with pytest.raises(ValueError, match="stored in 4 bits"):
        load(tmp_path / "four")


def test_the_default_length_is_cut_to_a_short_context_aloud(base, caplog):
    with caplog.at_level(logging.WARNING, "sparktune"):
        model, tokenizer = load(base, max_seq_length=2048)
    assert model.max_seq_length == tokenizer.model_max_length == 512
    assert "longer than the model's context: 512 is used" in caplog.text
    assert load(base, max_seq_length=None)[0].max_seq_length == 512


def test_a_family_without_rules_trains_as_hf_does_and_says_so(tmp_path, caplog):
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=500, n_positions=64)).eval()
    stock.save_pretrained(tmp_path)
    export_tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no rules for the model family 'gpt2'.*Patched: nothing.*4 Conv1D"):
        model, _ = load(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert "Patched: nothing" in caplog.text
    wrapped = FastLanguageModel.get_peft_model(model, r=2, fan_in_fan_out=True, use_gradient_checkpointing=False)
    report = FastLanguageModel.report(wrapped)
    assert report.counts == {} and report.family == "gpt2"
    assert set(report.left.values()) == {"no rules for the family 'gpt2'"}
    assert report.left.keys() >= {"base_model.model.transformer.h.0.attn.c_attn.base_layer"}
    out = wrapped(ids(), labels=ids())
    assert torch.allclose(out.loss, stock(ids(), labels=ids()).loss, rtol=1e-5)
    out.loss.backward()
    assert "sparktune.interface" not in str(type(wrapped))


def test_a_model_that_sparktune_did_not_load_is_refused(base):
    stock = AutoModelForCausalLM.from_pretrained(base)
    for call in (FastLanguageModel.get_peft_model, FastLanguageModel.for_training, FastLanguageModel.report):
        with pytest.raises(ValueError, match=r"use FastLanguageModel\.from_pretrained"):
            call(stock)


def test_training_and_inference_modes(base):
    model = lora(base)
    inner = model.get_base_model()
    assert inner.is_gradient_checkpointing
    assert FastLanguageModel.for_inference(model) is model
    assert not (model.training or inner.is_gradient_checkpointing) and inner.config.use_cache
    text = model.generate(ids()[:1], max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert text.shape[1] > 16
    assert FastLanguageModel.for_training(model) is model
    assert model.training and inner.is_gradient_checkpointing and not inner.config.use_cache
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    assert not inner.is_gradient_checkpointing


@pytest.mark.parametrize("mode", [True, "unsloth", "sparktune"])
def test_checkpointing_changes_no_gradient(base, mode):
    grads = []
    for chosen in (False, mode):
        model = lora(base, use_gradient_checkpointing=chosen, random_state=1).train()
        assert model.get_base_model().is_gradient_checkpointing is (chosen is not False)
        model(ids(), labels=ids()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*grads, strict=True))
    assert any(g.abs().max() > 0 for g in grads[0])


def test_the_models_own_choice_of_checkpointing_holds_against_a_trainers(base, caplog):
    model = lora(base, use_gradient_checkpointing=False)
    model.gradient_checkpointing_enable()
    assert not model.get_base_model().is_gradient_checkpointing and "which holds" in caplog.text
    model = lora(base)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.get_base_model().is_gradient_checkpointing
    with pytest.raises(ValueError, match="leave out gradient_checkpointing_kwargs"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_copy_of_the_model_is_its_own(base):
    model = lora(base)
    twin = copy.deepcopy(model)
    assert twin.save_pretrained_merged.__self__ is twin
    inner = twin.get_base_model()
    assert inner.gradient_checkpointing_enable.__self__ is inner


def test_padding_gets_a_token_of_its_own_or_the_end_token(base, tmp_path):
    tokenizer = export_tiny.make_tokenizer()
    tokenizer.pad_token = None
    export_tiny.save_base(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path)[1].pad_token == "<|im_end|>"
    assert load(tmp_path, fix_tokenizer=False)[1].pad_token is None
    tokenizer.add_tokens(["<|pad|>"])
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path)[1].pad_token == "<|pad|>"


def test_device_and_dtype_where_nobody_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choices.pick_device("sequential") == choices.pick_device({"": "cpu"}) == torch.device("cpu")
    assert choices.pick_dtype(None, torch.device("cpu")) == torch.float32
    assert not is_bfloat16_supported()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choices.pick_device("sequential") == torch.device("cuda", 1)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert is_bfloat16_supported() is supported
        assert choices.pick_dtype("auto", torch.device("cuda")) == dtype


def test_pages_of_read_weights_are_given_up(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 4096)
    (tmp_path / "config.json").write_text("{}")
    advice = []
    monkeypatch.setattr("os.posix_fadvise", lambda fd, start, length, what: advice.append((start, length, what)))
    assert loading.drop_pages(tmp_path) == 1
    assert advice == [(0, 0, os.POSIX_FADV_DONTNEED)]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "bound_mib"), [("load_in_4bit=True", 170), ("load_in_4bit=False", 570)])
def test_loading_never_holds_the_weights_twice(tmp_path, settings, bound_mib):
    """A model of 134M parameters, 257 MiB in bf16, 514 in fp32 and 66 in 4 bits: its highest anonymous memory as it loads.

    glibc is told to give freed tensors back at once, since what it keeps for later would count here.
    """
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_key_value_heads": 4}
    export_tiny.save_base(tmp_path, **size)
    script = f"""
import threading, time
import bitsandbytes, peft, transformers
from sparktune import FastLanguageModel
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
before, highest, done = anonymous(), 0.0, threading.Event()
def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous() - before)
thread = threading.Thread(target=watch)
thread.start()
model, _ = FastLanguageModel.from_pretrained({str(tmp_path)!r}, max_seq_length=64, device_map="cpu", {settings})
done.set()
thread.join()
print(round(highest))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert 0 < float(done.stdout.split()[-1]) < bound_mib, done.stderr[-2000:]
