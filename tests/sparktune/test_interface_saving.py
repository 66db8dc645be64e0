"""The saving methods of a model: what they write, what they refuse, and that the hub gets the folder."""

import json

import export_tiny
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file
from sparktune import FastLanguageModel
from sparktune.export import ExportError
from transformers import AutoModelForCausalLM, AutoTokenizer

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny")


def load(base, **changes):
    settings = {"max_seq_length": 64, "load_in_4bit": False, "device_map": {"": "cpu"}, **changes}
    return FastLanguageModel.from_pretrained(base, **settings)


def trained(base, **changes):
    """A model as training leaves it: B no longer zero."""
    model, tokenizer = load(base, **changes)
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, tokenizer


def ids():
    return torch.randint(0, 300, (1, 16), generator=torch.Generator().manual_seed(3))


def trained_whole(base, **changes):
    """Embedding and head trained whole beside LoRA, as Unsloth's users ask for continued pretraining."""
    model, tokenizer = load(base)
    model = FastLanguageModel.get_peft_model(
        model, r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], **changes
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model, tokenizer


@pytest.mark.parametrize("tied", [False, True])
def test_modules_trained_whole_replace_the_bases(tmp_path, tied):
    base = export_tiny.save_base(tmp_path / "base", tie_word_embeddings=tied)
    model, tokenizer = trained_whole(base, ensure_weight_tying=tied)
    out = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    before, after = (load_file(f / "model.safetensors") for f in (base, out))
    assert after.keys() == before.keys() and ("lm_head.weight" in after) is not tied
    inner = model.get_base_model()
    assert torch.equal(after["model.embed_tokens.weight"], inner.get_input_embeddings().weight.bfloat16())
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.allclose(stock(ids()).logits, model.eval()(ids()).logits, atol=0.2)
    assert model.save_pretrained_gguf(tmp_path / "gguf", tokenizer)[0].is_file()


def test_a_tied_embedding_trained_apart_from_its_head_is_not_merged(base, tmp_path):
    model, tokenizer = trained_whole(base)
    model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    with pytest.raises(ExportError, match="ensure_weight_tying=True"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer)


@pytest.mark.parametrize("four_bit", [False, True])
def test_merged_is_the_16_bit_base_plus_the_adapter(base, tmp_path, four_bit):
    model, tokenizer = trained(base, load_in_4bit=four_bit)
    tokenizer.chat_template = "{{ messages }}"
    out = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert out == tmp_path / "merged" and [p.name for p in tmp_path.iterdir()] == ["merged"]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    wanted = load_file(base / "model.safetensors")[Q].float() + update
    assert torch.equal(load_file(out / "model.safetensors")[Q], wanted.detach().bfloat16())
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    if not four_bit:
        with torch.no_grad():
            assert torch.allclose(stock(ids()).logits, model.eval()(ids()).logits, atol=0.15)


def test_lora_is_what_stock_peft_loads(base, tmp_path):
    model, tokenizer = trained(base)
    model.save_pretrained(tmp_path / "plain")
    out = model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    assert (out / "tokenizer.json").is_file()
    for folder in (tmp_path / "plain", out):
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        with torch.no_grad():
            assert torch.allclose(stock.eval()(ids()).logits, model.eval()(ids()).logits, rtol=1e-4, atol=1e-4)
    again, _ = load(out)
    assert again.peft_config["default"].base_model_name_or_path == str(base)
    again.save_pretrained_merged(tmp_path / "merged")
    assert (tmp_path / "merged/config.json").is_file()


def test_gguf_files_are_named_by_type_and_hold_the_merged_weights(base, tmp_path):
    model, tokenizer = trained(base)
    done = model.save_pretrained_gguf(
        tmp_path / "tiny", tokenizer, quantization_method=["q8_0", "f16", "not_quantized"]
    )
    assert [f.name for f in done] == ["tiny.Q8_0.gguf", "tiny.F16.gguf"]
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    v = load_file(tmp_path / "merged/model.safetensors")["model.layers.0.self_attn.v_proj.weight"].float()
    tensors = {t.name: t for t in GGUFReader(done[1]).tensors}
    stored = torch.from_numpy(tensors["blk.0.attn_v.weight"].data.copy()).float()
    assert torch.allclose(stored, v, atol=2e-3)
    assert GGUFReader(model.save_pretrained_gguf(tmp_path / "default")[0]).tensors


def test_a_fully_finetuned_model_is_saved_in_16_bits(base, tmp_path):
    model, tokenizer = load(base, full_finetuning=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.25)
    out = model.save_pretrained_merged(tmp_path / "whole", tokenizer)
    saved = load_file(out / "model.safetensors")
    assert saved[Q].dtype == torch.bfloat16
    assert torch.equal(saved[Q], model.model.layers[0].self_attn.q_proj.weight.bfloat16())
    assert set(saved) == set(load_file(base / "model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "plain")
    for folder in (out, tmp_path / "plain"):
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert model.save_pretrained_gguf(tmp_path / "gguf")[0].is_file()
    with pytest.raises(ValueError, match="use save_method='merged_16bit'"):
        model.save_pretrained_merged(tmp_path / "lora", save_method="lora")


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("save_pretrained_merged", {"save_method": "merged_8bit"}, "merged_4bit"),
        ("save_pretrained_merged", {"push_to_hub": True}, "push_to_hub_merged"),
        ("save_pretrained_merged", {"token": "hf_x"}, "push_to_hub_merged"),
        ("save_pretrained_merged", {"max_shard_size": "1GB"}, "keep the base's shards"),
        ("save_pretrained_merged", {"safe_serialization": False}, "saved as safetensors"),
        ("save_pretrained_gguf", {"quantization_method": "q3_k_xl"}, "q4_k_m"),
        ("save_pretrained_gguf", {"quantization_method": ["q8_0", "iq1_s"]}, "use one of f32"),
        ("save_pretrained_gguf", {"first_conversion": "bf16"}, "leave it out"),
        ("save_pretrained_gguf", {"push_to_hub": True}, "push_to_hub_gguf"),
    ],
)
def test_what_is_not_supported_is_refused_and_nothing_is_written(base, tmp_path, method, arguments, message):
    model, tokenizer = trained(base)
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(tmp_path / "out", tokenizer, **arguments)
    with pytest.raises(TypeError, match="'shards': leave it out"):
        getattr(model, method)(tmp_path / "out", tokenizer, shards=2)
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_adapter_and_a_bare_4_bit_model_are_refused(base, tmp_path):
    model, tokenizer = load(base, load_in_4bit=True)
    with pytest.raises(ExportError, match="nothing to merge"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer)
    model = FastLanguageModel.get_peft_model(model, r=4)
    with pytest.raises(ExportError, match="nothing was trained"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_base_stored_in_four_bits_needs_to_be_told_its_16_bit_one(base, tmp_path):
    load(base, load_in_4bit=True)[0].save_pretrained(tmp_path / "four")
    export_tiny.make_tokenizer().save_pretrained(tmp_path / "four")
    model, tokenizer = trained(tmp_path / "four", load_in_4bit=True)
    with pytest.raises(ExportError, match="Give the 16-bit model"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer)
    out = model.save_pretrained_merged(tmp_path / "out", tokenizer, base_model=base)
    assert load_file(out / "model.safetensors")[Q].dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "files"), [("merged", "model.safetensors"), ("gguf", "model.Q8_0.gguf")])
def test_pushing_uploads_the_folder_and_leaves_nothing(base, tmp_path, monkeypatch, kind, files):
    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            calls["repo"] = (repo_id, private, exist_ok)
            return f"https://example.invalid/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls["files"] = sorted(f.name for f in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = trained(base)
    url = getattr(model, f"push_to_hub_{kind}")("me/model", tokenizer, token="hf_x", private=True)
    assert url == "https://example.invalid/me/model"
    assert (calls["token"], calls["repo"]) == ("hf_x", ("me/model", True, True))
    assert files in calls["files"] and list(tmp_path.iterdir()) == []
