"""The formats around the weights: 4-bit, LoRA as GGUF, Ollama, vLLM, cards, the command line; and merges of every layout."""

import json
import shutil
import subprocess
import sys

import export_tiny
import families
import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sparktune import export
from sparktune.export import ExportError
from sparktune.export.__main__ import main
from sparktune.export.lora import Adapter

V = "model.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    patterns = {"alpha_pattern": {"v_proj": 4}, "rank_pattern": {"up_proj": 4}}
    return export_tiny.save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora", use_rslora=True, **patterns)


def test_4_bit_is_what_loading_the_merged_folder_in_4_bits_gives(base, adapter, tmp_path):
    from sparktune.quant.cpu_repack import keep_layout
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    keep_layout()
    done = export.export_merged_4bit(base, adapter, tmp_path / "four", shard_bytes=60_000)
    assert "second time" in done.notes[0] and done.merged == 14
    assert len(list((tmp_path / "four").glob("model-*-of-*.safetensors"))) > 1
    assert done.size_bytes < 0.8 * export.export_merged(base, adapter, tmp_path / "sixteen").size_bytes
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    load = AutoModelForCausalLM.from_pretrained
    ours = load(tmp_path / "four", device_map={"": "cpu"})
    theirs = load(tmp_path / "sixteen", device_map={"": "cpu"}, dtype=torch.bfloat16, quantization_config=config)
    assert type(ours.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_lora_gguf_has_every_scale(base, adapter, tmp_path):
    done = export.export_lora_gguf(base, adapter, tmp_path / "lora.gguf", "f32")
    reader = gguf.GGUFReader(done.path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(tensors) == 28 == done.tensors
    lora = Adapter.read(adapter)
    for module, name in ((V, "blk.0.attn_v"), ("model.layers.1.mlp.up_proj", "blk.1.ffn_up")):
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        wanted = lora.scale(module) * lora.pairs[module][1] @ lora.pairs[module][0]
        torch.testing.assert_close(alpha / a.shape[0] * b @ a, wanted)
    assert {lora.scale(V), lora.scale("model.layers.1.mlp.up_proj")} == {4 / 8**0.5, 16 / 4**0.5}
    with pytest.raises(ExportError, match="'q4_k_m'"):
        export.export_lora_gguf(base, adapter, tmp_path / "b.gguf", "q4_k_m")


def test_what_a_lora_gguf_and_vllm_cannot_hold_is_refused(base, tmp_path):
    whole = export_tiny.save_adapter(base, tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(ExportError, match=r"lm_head\.weight whole"):
        export.export_lora_gguf(base, whole, tmp_path / "lora.gguf")
    with pytest.raises(ExportError, match="trained whole"):
        export.export_vllm_adapter(base, whole, tmp_path / "served")
    embedding = export_tiny.save_adapter(base, tmp_path / "embedding", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ExportError, match="embed_tokens"):
        export.export_lora_gguf(base, embedding, tmp_path / "lora.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["embedding", "whole"]


def merged_alike(family, folder, **lora):
    """The folder that export_merged writes holds, in bf16, what PEFT's own merge gives."""
    model = families.build(family)
    model.save_pretrained(folder / "base")
    wrapped = families.with_lora(model, **lora)
    wrapped.save_pretrained(folder / "lora")
    done = export.export_merged(folder / "base", folder / "lora", folder / "merged")
    merged = type(model).from_pretrained(folder / "merged")
    wanted = wrapped.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == wanted.keys() and done.merged > 0
    changed = 0
    for name, tensor in wanted.items():
        rounded = tensor.to(torch.bfloat16).float() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(found[name].float(), rounded.float(), rtol=2**-7, atol=1e-6)
        changed += int(not torch.equal(found[name].float(), rounded.float()))
    assert changed <= len(wanted) // 2, "most are equal to the last bit; a sum in another order may flip a rounding"
    return done


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_merged_as_peft_merges_them(family, tmp_path):
    merged_alike(family, tmp_path, use_rslora=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in ("mixtral", "gpt_oss")])
def test_every_family_is_merged_as_peft_merges_it(family, tmp_path):
    merged_alike(family, tmp_path)


def test_lora_on_an_embedding_is_merged(base, tmp_path):
    from transformers import AutoModelForCausalLM

    lora = export_tiny.save_adapter(base, tmp_path / "lora", target_modules=["embed_tokens", "q_proj"])
    weights = load_file(lora / "adapter_model.safetensors")
    weights = {n: torch.randn_like(t) * 0.1 if "embedding_" in n or "lora_B" in n else t for n, t in weights.items()}
    save_file(weights, lora / "adapter_model.safetensors")
    export.export_merged(base, lora, tmp_path / "merged")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    wanted = peft.merge_and_unload().state_dict()["model.embed_tokens.weight"].bfloat16()
    found = load_file(tmp_path / "merged/model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-6)
    assert not torch.equal(found, load_file(base / "model.safetensors")["model.embed_tokens.weight"])


def mxfp4_base(folder):
    """A tiny gpt-oss whose experts are stored as its publisher stores them; returns it and one expert's true weights."""
    families.build("gpt_oss", torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, out = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, inner // 32, 16), generator=draw).byte()
        weights[f"{name}_scales"] = torch.randint(118, 125, (experts, out, inner // 32), generator=draw).byte()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    stem = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = weights[f"{stem}_blocks"][3].long(), weights[f"{stem}_scales"][3].float()
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return stem, (levels[codes] * torch.exp2(scales - 127)[..., None]).flatten(-2).T


def test_a_base_in_mxfp4_becomes_16_bits_exactly(tmp_path):
    stem, wanted = mxfp4_base(tmp_path / "base")
    done = export.export_merged(tmp_path / "base", None, tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")[stem][3]
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), wanted) and done.merged == 0
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    weights = load_file(tmp_path / "base/model.safetensors")
    del weights[f"{stem}_scales"]
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="no scales beside it"):
        export.export_merged(tmp_path / "base", None, tmp_path / "again")


@pytest.mark.parametrize("method", ["merged", "merged_4bit", "lora_gguf", "vllm"])
def test_a_full_disk_is_told_with_its_arithmetic(base, adapter, tmp_path, monkeypatch, method):
    monkeypatch.setattr(export.files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(export.NoSpaceError, match=r"parameters x|GB of LoRA"):
        getattr(export, f"export_{method}")(base, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_vllm_stops_where_a_turn_ends(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.6}))
    done = export.export_vllm(tmp_path / "base", adapter, tmp_path / "served", shard_bytes=100_000)
    settings = json.loads((tmp_path / "served/generation_config.json").read_text())
    assert settings == {"eos_token_id": [0, 2], "temperature": 0.6}
    assert done.notes == [f"vllm serve {tmp_path / 'served'}"] and (tmp_path / "served/chat_template.jinja").is_file()
    assert (tmp_path / "served/model.safetensors.index.json").is_file()
    done = export.export_vllm_adapter(base, adapter, tmp_path / "lora", "owner/base")
    assert "--max-lora-rank 8 --lora-modules lora=" in done.notes[0]
    (tmp_path / "base/chat_template.jinja").unlink()
    with pytest.raises(ExportError, match="no chat template"):
        export.export_vllm(tmp_path / "base", None, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_card_says_what_was_made_of_what(base, adapter, tmp_path):
    from huggingface_hub import ModelCard

    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    done = export.export_ollama(tmp_path / "base", tmp_path / "out", "q4_0", adapter)
    path = export.write_card(
        tmp_path / "out", "owner/base", base=tmp_path / "base", adapter=adapter, done=done, training={"steps": 60}
    )
    card = ModelCard.load(path)
    assert (card.data.license, card.data.base_model, card.data.language) == ("mit", "owner/base", "en")
    for said in ("ollama create out", "| r | 8 |", "| steps | 60 |", "tensors |"):
        assert said in card.text, said
    with pytest.raises(ExportError, match="no exported model"):
        export.write_card(tmp_path, "owner/base")


def test_the_command_line_reaches_formats_and_refuses_what_it_has_no_use_for(base, adapter, tmp_path, capsys):
    common = ["--base", str(base), "--adapter", str(adapter)]
    (tmp_path / "mix.json").write_text('{"attn_v": "q8_0"}')
    mix = ["--type", "q4_0", "--tensor-types", str(tmp_path / "mix.json")]
    assert main(["gguf", *common, *mix, "--out", str(tmp_path / "m.gguf")]) == 0
    assert json.loads(capsys.readouterr().out)["type_counts"]["Q8_0"] >= 2
    assert main(["merged_16bit", *common, "--card", "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged/README.md").is_file()
    for arguments, message in (
        (["merged_16bit", *common, "--type", "q4_0"], "--type is not for merged_16bit"),
        (["lora_gguf", "--base", str(base)], "needs an adapter"),
        (["gguf", *common, "--card"], "is a file"),
        (["ollama", *common, "--parameter", "temperature"], "no NAME=NUMBER"),
        (["gguf", *common, "--tensor-types", str(base / "none.json")], "can't be read as JSON"),
        (["gguf", "--base", str(base), "--revision", "main"], "has no revision"),
    ):
        capsys.readouterr()
        assert main([*arguments, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_base_that_is_not_to_be_had_is_told(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def nowhere(name, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nowhere)
    with pytest.raises(ExportError, match="owner/base at abc is neither a folder nor to be had"):
        export.find_base("owner/base", "abc")
    assert export.find_base(tmp_path) == tmp_path


CHILD = """
import json, sys
from pathlib import Path
from sparktune import export
tiny, base, lora, out = map(Path, sys.argv[1:5])

def grown(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    def of(key):
        return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").open() if l.startswith(key))
    before = of("VmRSS")
    work()
    return of("VmHWM") - before

works = {
    "merged": lambda base, lora, to: export.export_merged(base, lora, to, shard_bytes=20_000_000),
    "gguf": lambda base, lora, to: export.export_gguf(base, to, "q8_0", lora),
    "4bit": lambda base, lora, to: export.export_merged_4bit(base, lora, to, shard_bytes=20_000_000),
}
sizes = {}
for name in sys.argv[5:]:
    works[name](tiny, None, out / f"tiny-{name}")  # so that libraries are loaded
    sizes[name] = grown(lambda: works[name](base, lora, out / name))
print(json.dumps(sizes))
"""


def grown(tiny, folder, layers, *formats):
    """(bytes by which exports in a process of their own grow it, bytes of the model), whose largest tensor has 2 MB."""
    shutil.copytree(tiny, folder / "base")
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = json.loads((tiny / "config.json").read_text()) | sizes | {"head_dim": 128, "num_hidden_layers": layers}
    (folder / "base/config.json").write_text(json.dumps(config))
    modules = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
    names = [f"model.layers.{i}.{module}" for i in range(layers) for module in modules]
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(layers) for n in ("input", "post_attention")]
    draw = torch.Generator().manual_seed(0)
    weights = {f"{n}.weight": torch.rand(1024, 1024, generator=draw).bfloat16() for n in names}
    weights |= {f"{n}.weight": torch.ones(1024).bfloat16() for n in [*norms, "model.norm"]}
    weights |= {
        f"{n}.weight": torch.ones(config["vocab_size"], 1024).bfloat16() for n in ("model.embed_tokens", "lm_head")
    }
    save_file(weights, folder / "base/model.safetensors", metadata={"format": "pt"})
    lora = {f"base_model.model.{n}.lora_A.weight": torch.rand(2, 1024, generator=draw) for n in names}
    lora |= {f"base_model.model.{n}.lora_B.weight": torch.rand(1024, 2, generator=draw) for n in names}
    (folder / "lora").mkdir()
    save_file(lora, folder / "lora/adapter_model.safetensors")
    (folder / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2}))
    places = [str(tiny), str(folder / "base"), str(folder / "lora"), str(folder)]
    ran = subprocess.run([sys.executable, "-c", CHILD, *places, *formats], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1]), (folder / "base/model.safetensors").stat().st_size


def test_memory_grows_by_tensors_and_not_by_the_model(base, tmp_path):
    by, size = grown(base, tmp_path, 8, "merged", "gguf")
    assert size > 117e6 and max(by.values()) < 0.5 * size, by


@pytest.mark.slow
def test_memory_of_a_larger_model_grows_no_more(base, tmp_path):
    by, size = grown(base, tmp_path, 24, "merged", "gguf", "4bit")
    assert size > 350e6 and max(by.values()) < 0.25 * size, by
