"""sparktune.export on tiny models: the arithmetic, what is copied, and what is refused."""

import json
import shutil

import export_tiny
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparktune.export import ExportError, NoSpaceError, export_adapter, export_gguf, export_merged, files, save_adapter
from sparktune.export.lora import Adapter
from sparktune.export.vocabulary import PRE_TOKENIZERS, pre_tokenizer

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return export_tiny.save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_merged_weights_are_rounded_once_from_fp32(base, adapter, tmp_path):
    done = export_merged(base, adapter, tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    lora = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model." + Q.removesuffix(".weight")
    update = 16 / 8 * lora[f"{stem}.lora_B.weight"].double() @ lora[f"{stem}.lora_A.weight"].double()
    wanted = before[Q].double() + update
    assert after[Q].dtype == torch.bfloat16
    half_step = wanted.abs() * 2.0**-8  # of bf16
    assert ((after[Q].double() - wanted).abs() <= half_step * 1.001).all()
    assert not torch.equal(after[Q], before[Q])
    assert set(after) == set(before), "tied embeddings stay tied"
    untouched = [n for n in before if "norm" in n or "embed" in n]
    assert untouched and all(torch.equal(before[n], after[n]) for n in untouched)
    assert (done.tensors, done.merged) == (len(before), 14)


def test_an_update_is_made_where_the_weight_lies(adapter):
    """A model on a GPU takes an adapter's file that was read on the CPU; no GPU here, so the device without memory."""
    saved = Adapter.read(adapter)
    name = next(iter(saved.pairs))
    a, b = saved.pairs[name]
    weight = torch.empty(b.shape[0], a.shape[1], device="meta")
    assert saved.apply(f"{name}.weight", weight).device.type == "meta"
    assert saved.used == {f"{name}.weight"}


def test_merged_agrees_with_peft(base, adapter, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export_merged(base, adapter, tmp_path / "merged")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    wanted = peft.merge_and_unload().state_dict()[Q]
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")[Q], wanted.bfloat16())


def test_shards_stay_and_the_index_is_right(tmp_path):
    base = export_tiny.save_base(tmp_path / "base", shard="60KB")
    adapter = export_tiny.save_adapter(base, tmp_path / "lora")
    export_merged(base, adapter, tmp_path / "merged")
    shards = sorted(f.name for f in base.glob("*.safetensors"))
    assert len(shards) > 2 and shards == sorted(f.name for f in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    for name in shards:
        assert {index["weight_map"][t] for t in load_file(tmp_path / "merged" / name)} == {name}
    assert export_gguf(base, tmp_path / "m.gguf", "f16", adapter).merged == 14
    (base / shards[1]).unlink()
    with pytest.raises(ExportError, match="can't be read"):
        export_merged(base, adapter, tmp_path / "again")


def test_tokenizer_template_and_config_come_along(base, adapter, tmp_path):
    export_merged(base, adapter, tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes(), name
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    export_adapter(base, adapter, tmp_path / "lora", "owner/model")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model"
    assert (tmp_path / "lora/tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("extra", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 16 / 8**0.5), ({"alpha_pattern": {"q_proj": 4}}, 0.5), ({"r": 4}, 4.0)],
)
def test_the_scale_follows_the_adapter_config(base, tmp_path, extra, scale):
    lora = Adapter.read(export_tiny.save_adapter(base, tmp_path / "lora", **extra))
    assert lora.scale("model.layers.0.self_attn.q_proj") == pytest.approx(scale)


def test_a_live_model_is_saved_whole_or_refused(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ExportError, match="nothing was trained"):
        save_adapter(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
    torch.nn.init.ones_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    assert (save_adapter(model, tmp_path / "lora") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "LOHA"}, "LOHA"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(base, adapter, tmp_path, change, message):
    shutil.copytree(adapter, tmp_path / "lora")
    edit_json(tmp_path / "lora/adapter_config.json", **change)
    with pytest.raises(ExportError, match=message):
        export_merged(base, tmp_path / "lora", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    wide = export_tiny.save_base(tmp_path / "wide", hidden_size=96, num_attention_heads=6)
    deep = export_tiny.save_base(tmp_path / "deep", num_hidden_layers=3)
    for other, message in ((wide, "is for a"), (deep, "does not store")):
        lora = export_tiny.save_adapter(other, tmp_path / f"lora-{other.name}")
        with pytest.raises(ExportError, match=message):
            export_merged(base, lora, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_diverged_adapter_is_refused(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "lora")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(ExportError, match="not finite"):
        export_adapter(base, tmp_path / "lora", tmp_path / "out")


def test_a_quantised_base_is_refused(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    edit_json(tmp_path / "base/config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ExportError, match="second time"):
        export_merged(tmp_path / "base", adapter, tmp_path / "merged")


def test_a_full_disk_is_told_before_the_first_byte(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    for export, name in ((export_merged, "merged"), (export_adapter, "lora")):
        with pytest.raises(NoSpaceError, match="GB free"):
            export(base, adapter, tmp_path / name)
    with pytest.raises(NoSpaceError):
        export_gguf(base, tmp_path / "m.gguf", "f16", adapter)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(base, adapter, tmp_path, monkeypatch, error):
    def fail(self, name, weight):
        raise error

    monkeypatch.setattr(Adapter, "apply", fail)
    with pytest.raises(type(error)):
        export_merged(base, adapter, tmp_path / "merged")
    with pytest.raises(type(error)):
        export_gguf(base, tmp_path / "m.gguf", "q8_0", adapter)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_a_killed_export_are_removed_and_those_of_a_live_one_kept(base, adapter, tmp_path):
    dead, live = tmp_path / ".merged.999999999.part", tmp_path / ".merged.1.part"
    for part in (dead, live):
        part.mkdir()
    export_merged(base, adapter, tmp_path / "merged")
    assert not dead.exists() and live.exists()


def test_nothing_is_overwritten(base, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine.txt").write_text("mine")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export_merged(base, adapter, tmp_path / "merged")
    with pytest.raises(ExportError, match="exists already"):
        export_gguf(base, tmp_path / "m.gguf", "f16", adapter)
    assert (tmp_path / "merged/mine.txt").read_text() == (tmp_path / "m.gguf").read_text() == "mine"


def test_the_same_input_gives_the_same_file(base, adapter, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        export_gguf(base, tmp_path / name, "q8_0", adapter)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_value_beyond_fp16_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[Q][0, 0] = 1e6
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="65504"):
        export_gguf(tmp_path / "base", tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", [name for name, _, _ in PRE_TOKENIZERS])
def test_the_pre_tokenizer_is_told_by_its_definition(name):
    definition = json.loads(export_tiny.make_tokenizer(name).backend_tokenizer.to_str())
    assert pre_tokenizer(definition) == name


def test_qwens_normalised_text_is_known(base):
    """Made by transformers' own class, around other merges."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab={"a": 0, "b": 1}, merges=[])
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    assert definition["normalizer"] == {"type": "NFC"} and pre_tokenizer(definition) == "qwen2"
    definition["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"
    with pytest.raises(ExportError, match="normalises its text"):
        pre_tokenizer(definition)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("pre_tokenizer", "pretokenizers", 0, "individual_digits"), False),
        (("model", "ignore_merges"), True),
        (("model", "byte_fallback"), True),
        (("model", "type"), "Unigram"),
        (("normalizer",), {"type": "NFC"}),
        (("pre_tokenizer",), None),
    ],
)
def test_an_unknown_tokenizer_is_refused_not_guessed(path, value):
    definition = json.loads(export_tiny.make_tokenizer("smollm").backend_tokenizer.to_str())
    inner = definition
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ExportError):
        pre_tokenizer(definition)
