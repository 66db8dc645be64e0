"""GGUF exports on tiny models: types, bytes, adapters, and what is refused."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import export_tiny
import families
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparkproof.session import default_cache_dir
from sparktune.export import QTYPES, ExportError, Shape, export_gguf, export_merged, plan_types
from sparktune.export.ggml import quantise
from sparktune.quant.dynamic.formats import GGUF_TYPES

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
Q = "model.layers.0.self_attn.q_proj.weight"
BLOCKS = {kind.name: gguf.GGML_QUANT_SIZES[kind][0] for kind in gguf.GGMLQuantizationType}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny", **SIZES)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return export_tiny.save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora", use_rslora=True)


def read(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def values(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(
    ("qtype", "counts"),
    [
        ("f32", {"F32": 74}),
        ("f16", {"F32": 17, "F16": 57}),
        ("bf16", {"F32": 17, "BF16": 57}),
        ("q8_0", {"F32": 17, "Q8_0": 57}),
        ("q6_k", {"F32": 17, "Q6_K": 57}),
        ("q5_k_m", {"F32": 17, "Q5_K": 48, "Q6_K": 9}),
        ("q4_k_m", {"F32": 17, "Q4_K": 48, "Q6_K": 9}),
        ("q4_0", {"F32": 17, "Q4_0": 56, "Q6_K": 1}),
        ("mxfp4", {"F32": 17, "MXFP4": 56, "Q8_0": 1}),
    ],
)
def test_every_type_is_in_the_file_and_near_the_merged_weights(base, adapter, tmp_path, qtype, counts):
    done = export_gguf(base, tmp_path / "m.gguf", qtype, adapter)
    tensors = read(done.path)
    assert done.types == {name: t.tensor_type.name for name, t in tensors.items()}
    assert done.to_json()["type_counts"] == counts and not done.fallbacks
    assert done.merged == 56 and set(QTYPES) >= {qtype}
    export_merged(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    wanted = merged["model.layers.3.mlp.down_proj.weight"].float().numpy()
    found = values(tensors["blk.3.ffn_down.weight"])
    worst = {"f32": 4e-3, "f16": 4e-3, "bf16": 6e-3, "q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.06}.get(qtype, 0.2)
    assert np.linalg.norm(found - wanted) <= worst * np.linalg.norm(wanted)
    before = load_file(base / "model.safetensors")["model.layers.3.mlp.down_proj.weight"].float().numpy()
    assert np.linalg.norm(wanted - before) > 0.25 * np.linalg.norm(wanted), (
        "the update is larger than any type's rounding"
    )


def test_the_merge_is_rounded_once(base, adapter, tmp_path):
    """q8_0 of the fp32 sum, not of its bf16 rounding."""
    from sparktune.export.hf import opened

    checkpoint, lora = opened(base, adapter)
    name = "model.layers.0.self_attn.v_proj.weight"
    merged = lora.apply(name, checkpoint.stored[name].read())
    export_gguf(base, tmp_path / "m.gguf", "q8_0", adapter)
    wanted = quantise(merged.numpy(), gguf.GGMLQuantizationType.Q8_0, 272)
    assert (read(tmp_path / "m.gguf")["blk.0.attn_v.weight"].data == wanted).all()


def test_k_quants_fall_back_where_rows_are_no_multiple_of_256(tmp_path):
    base = export_tiny.save_base(tmp_path / "base", hidden_size=96, intermediate_size=512, num_attention_heads=6)
    done = export_gguf(base, tmp_path / "m.gguf", "q4_k_m")
    types = {name: t.tensor_type.name for name, t in read(done.path).items()}
    assert types == done.types and types["blk.0.attn_q.weight"] == "Q5_0" and types["token_embd.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == "Q6_K", "512 is a multiple of 256"
    assert done.fallbacks["blk.0.attn_q.weight"] == "Q4_K" and "did not fit" in done.notes[0]


def test_a_mix_takes_names_before_patterns_before_rules(base, tmp_path):
    mix = {"blk.2.attn_v.weight": "q8_0", r"attn_v": "q6_k", r"ffn_down": "iq4_xs"}
    types = export_gguf(base, tmp_path / "m.gguf", "q4_k_m", tensor_types=mix).types
    assert types["blk.2.attn_v.weight"] == "Q8_0" and types["blk.3.attn_v.weight"] == "Q6_K"
    assert types["blk.3.ffn_down.weight"] == "IQ4_XS" and types["blk.3.attn_q.weight"] == "Q4_K"
    assert types["blk.3.attn_norm.weight"] == "F32"
    for wrong, message in (
        ({"blk.9.attn_v": "q8_0"}, "fits no tensor"),
        ({"attn_norm": "q8_0"}, "kept in f32"),
        ({"attn_v": "q9"}, "the type 'q9'"),
        ({"attn_v(": "q8_0"}, "no regular expression"),
        ({"attn_v": "iq2_xs"}, "importance matrix"),
    ):
        with pytest.raises(ExportError, match=message):
            export_gguf(base, tmp_path / "wrong.gguf", "q4_k_m", tensor_types=wrong)
    with pytest.raises(ExportError, match="'q3_k_s'"):
        export_gguf(base, tmp_path / "wrong.gguf", "q3_k_s")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def write_imatrix(path, sums):
    """As llama-imatrix does: for each tensor its columns' summed squares, of 30 tokens."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["made up"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 10)
    for name, columns in sums.items():
        writer.add_tensor(f"{name}.in_sum2", columns[None].astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 30, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix_changes_the_bytes_and_not_the_types(base, tmp_path):
    columns = np.linspace(1, 900, 256, dtype=np.float32)
    write_imatrix(tmp_path / "imatrix.gguf", {"blk.0.attn_q.weight": columns})
    plain = export_gguf(base, tmp_path / "a.gguf", "q4_k_m")
    weighted = export_gguf(base, tmp_path / "b.gguf", "q4_k_m", imatrix=tmp_path / "imatrix.gguf")
    a, b = read(plain.path), read(weighted.path)
    assert plain.types == weighted.types
    assert [n for n in a if (a[n].data != b[n].data).any()] == ["blk.0.attn_q.weight"]
    exact = values(read(export_gguf(base, tmp_path / "c.gguf", "f32").path)["blk.0.attn_q.weight"])
    error = {
        k: (((values(t["blk.0.attn_q.weight"]) - exact) ** 2) * columns).sum() for k, t in {"a": a, "b": b}.items()
    }
    assert error["b"] < error["a"], "weighted errors are what an importance matrix makes small"
    with pytest.raises(ExportError, match="no importance matrix"):
        export_gguf(base, tmp_path / "d.gguf", "q4_k_m", imatrix=plain.path)


def test_more_bits_go_to_the_layers_that_llama_cpp_names():
    tensors = {f"blk.{i}.{t}.weight": (256, 256) for i in range(16) for t in ("attn_v", "ffn_down", "attn_q")}
    tensors |= {"token_embd.weight": (500, 256), "output.weight": (500, 256), "blk.0.ffn_norm.weight": (256,)}
    dense = plan_types(tensors, "q4_k_m", Shape(16), BLOCKS).types
    more = [i for i in range(16) if dense[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15] == [i for i in range(16) if dense[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert (dense["output.weight"], dense["token_embd.weight"], dense["blk.0.ffn_norm.weight"]) == (
        "Q6_K",
        "Q4_K",
        "F32",
    )
    eight = plan_types(tensors, "q4_k_m", Shape(16, experts=8), BLOCKS).types
    assert {eight[f"blk.{i}.attn_v.weight"] for i in range(16)} == {"Q8_0"}
    assert plan_types({**tensors, "blk.0.ffn_up_exps.weight": (8, 64, 256)}, "mxfp4", Shape(16, 8), BLOCKS).types == {
        name: "F32" if "norm" in name else "MXFP4" if "exps" in name else "Q8_0"
        for name in [*tensors, "blk.0.ffn_up_exps.weight"]
    }


def test_a_wrong_embedding_or_unknown_architecture_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for change, message in (
        ({"vocab_size": config["vocab_size"] + 8}, "rows and the vocabulary"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not know the architecture"),
        ({"tie_word_embeddings": "x", "model_type": "none", "architectures": None}, "llama.cpp can't convert"),
    ):
        (tmp_path / "base/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ExportError, match=message):
            export_gguf(tmp_path / "base", tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


def test_a_missing_converter_names_the_cure(base, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARKTUNE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ExportError, match="SPARKTUNE_LLAMA_CPP"):
        export_gguf(base, tmp_path / "m.gguf", "f16")


def test_weights_that_are_not_finite_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[Q][0, 0] = float("nan")
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="not finite"):
        export_gguf(tmp_path / "base", tmp_path / "m.gguf", "q4_k_m")
    assert not (tmp_path / "m.gguf").exists()


def test_progress_ends_at_all_bytes(base, tmp_path):
    seen = []
    done = export_gguf(base, tmp_path / "m.gguf", "q4_0", progress=lambda *said: seen.append(said))
    assert len(seen) == 74 and [d for _, d, _ in seen] == sorted(d for _, d, _ in seen)
    assert abs(seen[-1][1] - seen[-1][2]) < 4096 and seen[-1][2] < done.size_bytes < seen[-1][2] + 65536


def test_other_code_keeps_its_own_gguf_package(base, tmp_path):
    import sys

    export_gguf(base, tmp_path / "m.gguf", "f16")
    assert sys.modules["gguf"] is gguf and "conversion" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("qtype", ["q6_k", "q5_k_m", "q4_k_m", "q4_0"])
def test_the_bytes_are_those_of_llama_quantize(base, tmp_path, qtype):
    """Wherever llama.cpp's own library is, which the project does not install."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    export_gguf(base, tmp_path / "from.gguf", "bf16")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = {"q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_0": 2}[qtype]
    source, target = str(tmp_path / "from.gguf").encode(), str(tmp_path / "theirs.gguf").encode()
    assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(parameters)) == 0
    theirs, ours = read(tmp_path / "theirs.gguf"), read(export_gguf(base, tmp_path / "ours.gguf", qtype).path)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.tensor_type == ours[name].tensor_type and (tensor.data == ours[name].data).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("important", [False, True])
def test_the_bytes_of_every_type_that_mixes_are_offered_are_those_of_llama_quantize(base, tmp_path, important):
    """Wherever scripts/llama_tools.py has built llama.cpp's tools, as `make dynamic-curve` has it do."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import llama_tools

    tools = default_cache_dir() / "llama-tools"
    if not llama_tools.built(tools):
        pytest.skip("llama.cpp's tools are not built")
    source, matrix = export_gguf(base, tmp_path / "f16.gguf", "f16").path, None
    matrices = sorted(n for n, t in read(source).items() if len(t.shape) > 1 and n.startswith("blk."))
    mix = {name: GGUF_TYPES[i % len(GGUF_TYPES)] for i, name in enumerate(matrices)}
    mix["token_embd.weight"] = "q2_K"  # the smallest, on what no importance matrix covers
    assert set(mix.values()) == set(GGUF_TYPES)
    (tmp_path / "types.txt").write_text("\n".join(f"^{re.escape(name)}$={kind}" for name, kind in mix.items()))
    command = [tools / "llama-quantize", "--tensor-type-file", tmp_path / "types.txt"]
    if important:
        draw = np.random.default_rng(0)
        widths = {name: read(source)[name].shape[0] for name in matrices}
        matrix = write_imatrix(tmp_path / "imatrix.gguf", {n: draw.random(w) for n, w in widths.items()})
        command += ["--imatrix", matrix]
    done = subprocess.run(
        [*command, source, tmp_path / "theirs.gguf", "Q4_0", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours = read(export_gguf(base, tmp_path / "ours.gguf", "q4_0", tensor_types=mix, imatrix=matrix).path)
    for name, tensor in read(tmp_path / "theirs.gguf").items():
        assert tensor.tensor_type == ours[name].tensor_type and (tensor.data == ours[name].data).all(), name
        assert name not in mix or tensor.tensor_type.name == mix[name].upper()


def test_a_stack_of_experts_is_quantised_expert_by_expert():
    """The importance of a column is an expert's own."""
    rows = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).numpy()
    kind = gguf.GGMLQuantizationType.Q4_K
    plain, flat = quantise(rows, kind, 144), quantise(rows, kind, 144, np.ones(256, dtype=np.float32))
    assert plain.shape == (4, 144) and (plain != flat).any()
    with pytest.raises(ExportError, match="not finite"):
        quantise(np.full((1, 256), np.inf, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0, 272)


def test_a_family_of_sentencepiece_without_its_model_file_names_the_cure(tmp_path):
    base = tmp_path / "base"
    families.build("phi3").save_pretrained(base)
    export_tiny.make_tokenizer().save_pretrained(base)
    definition = json.loads((base / "tokenizer.json").read_text())
    definition["model"]["byte_fallback"] = True  # as SentencePiece's become
    (base / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ExportError, match=r"Put the tokenizer\.model of the base's repository beside it"):
        export_gguf(base, tmp_path / "m.gguf", "f16")


def test_byte_level_bpe_in_a_family_of_sentencepiece_is_written_as_that(tmp_path):
    """Phi-4's tokenizer is one, and transformers 5 saves it under another class than the converter knows."""
    model, tokenizer = families.build("phi3"), export_tiny.make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    done = export_gguf(tmp_path / "base", tmp_path / "m.gguf", "f16", name="my-phi3-tune")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["general.name"].contents() == "my-Phi 3-tune" and any("Phi 3" in n for n in done.notes)
