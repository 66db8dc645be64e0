"""What llama.cpp takes for granted of a family: told to it, refused, or said; and the exports that prove it, by distributions."""

import json

import pytest
from sparkproof.engines.tiny import WIDE_CHANGES, make
from sparktune.export import ExportError, export_gguf, export_merged, export_vllm
from sparktune.export.llama_cpp_limits import complete


def test_a_merged_deepseek_v3_has_the_keys_that_vllm_asks_for(tmp_path):
    wanted = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    base = tmp_path / "base"
    make("deepseek_v3", base)
    config = json.loads((base / "config.json").read_text())
    assert wanted.items() <= config.items(), "the tiny one has them as the hub's has"
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in wanted}))
    export_merged(base, None, tmp_path / "merged")
    assert wanted.items() <= json.loads((tmp_path / "merged/config.json").read_text()).items()


def test_a_deepseek_whose_embedding_is_its_head_is_refused_for_vllm(tmp_path):
    make("deepseek_v3", tmp_path / "base")
    with pytest.raises(ExportError, match="leaves it at zero"):
        export_vllm(tmp_path / "base", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make("deepseek_v3", tmp_path / "headed", wide=True, headed=True)
    assert export_vllm(tmp_path / "headed", None, tmp_path / "out").notes


def test_deepseek_v3_says_that_its_router_is_a_sigmoid():
    bare = {"architectures": ["DeepseekV3ForCausalLM"]}
    assert complete(bare)[0]["scoring_func"] == "sigmoid" and "scoring_func" not in bare
    assert complete({**bare, "scoring_func": "softmax"})[0]["scoring_func"] == "softmax", "what it says itself holds"
    other = {"architectures": ["DeepseekV2ForCausalLM"]}
    assert complete(other) == (other, [])


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]}, True),
        ({}, True),  # its default
        ({"no_rope_layers": [1, 0] * 4}, False),
        ({"no_rope_layer_interval": 2}, False),
        ({"no_rope_layers": [1] * 8}, False),
    ],
)
def test_a_smollm3_with_rope_elsewhere_is_refused(changes, right):
    config = {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 8, **changes}
    if right:
        assert complete(config) == (config, [])
        return
    with pytest.raises(
        ExportError, match=r"llama\.cpp can't run it: its SmolLM3 has no RoPE in every 4th layer"
    ) as caught:
        complete(config)
    assert "merged_16bit" in caught.value.fix


@pytest.mark.parametrize(("rope", "told"), [({"rope_type": "yarn", "truncate": False}, 1), ({"rope_type": "yarn"}, 0),
                                            ({"rope_type": "default", "truncate": False}, 0), (None, 0)])  # fmt: skip
def test_a_yarn_that_is_not_rounded_is_said(rope, told):
    assert len(complete({"architectures": ["GptOssForCausalLM"], "rope_parameters": rope})[1]) == told


def test_a_refused_smollm3_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(WIDE_CHANGES, "smollm3", {})  # two layers, the second without RoPE
    make("smollm3", tmp_path / "base", wide=True)
    with pytest.raises(ExportError, match="can't run it"):
        export_gguf(tmp_path / "base", tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "smollm3"])
def test_llama_cpp_predicts_as_transformers_does(tmp_path, family):
    from sparkproof.runners.export_hf import HfModel
    from sparkproof.runners.export_judge import kl
    from sparkproof.runners.export_llamacpp import LlamaCppModel

    make(family, tmp_path / "base", wide=True)
    export_gguf(tmp_path / "base", tmp_path / "m.gguf", "f32")
    ours, theirs = HfModel(tmp_path / "base"), LlamaCppModel(tmp_path / "m.gguf")
    ids = ours.tokenize(
        "The capital of France is Paris, and 12 times 4096 is 49152. Say hello in Chinese, please, again."
    )
    positions = list(range(0, len(ids), 6))
    rows = [m.log_probabilities(ids, positions, ours.vocabulary) for m in (ours, theirs)]
    theirs.close()
    assert kl(*rows).max() < 1e-4
