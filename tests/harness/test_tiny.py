"""Tiny models of each family: made once, real architectures, a real tokenizer, and a scenario that each of them passes."""

import json
from pathlib import Path

import pytest
from sparkproof import catalog
from sparkproof.engines import tiny
from sparkproof.engines.pretrained import resolve
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.results import Verdict
from sparkproof.runners import train
from sparkproof.runners.base import Context
from sparkproof.scenario import Profile

ROOT = Path(__file__).parents[2]
NAME = "train/{}/tiny_qlora_single_device"


@pytest.fixture(scope="module")
def scenarios():
    found = catalog.load(ROOT / "scenarios")
    assert found.problems == []
    return found.cases


def test_every_family_of_sparktune_has_a_tiny_scenario_on_both_engines(scenarios):
    from sparktune.models.patch import FAMILIES

    known = {"gemma3" if name == "gemma3_text" else name for name in FAMILIES}
    assert known == set(tiny.FAMILIES)
    for family in known:
        for engine in ("hf", "sparktune"):
            scenario = scenarios[f"{NAME.format(family)}[engine={engine}]"].scenario
            assert scenario.model == f"tiny:{family}" and not scenario.requires.network and not scenario.requires.gpu
    quick = {n for n, c in scenarios.items() if "/tiny_" in n and c.scenario.profile is Profile.QUICK}
    assert {n.split("/")[1] for n in quick} == {"gemma3", "qwen3_moe"}
    assert not any("/tiny_" in n and c.scenario.profile is Profile.SMOKE for n, c in scenarios.items())


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_folder_is_made_once_and_is_what_from_pretrained_reads(tmp_path, family):
    found = resolve(f"tiny:{family}", "", tmp_path)
    assert (found.source, found.licence) == ("tiny", "none: random weights")
    config = json.loads((found.path / "config.json").read_text())
    assert config["model_type"] == family and config["dtype"] == "bfloat16"
    before = (found.path / "model.safetensors").stat().st_mtime_ns
    assert resolve(f"tiny:{family}", "", tmp_path) == found
    assert (found.path / "model.safetensors").stat().st_mtime_ns == before


def test_the_cut_tokenizer_is_real_and_loses_nothing():
    tokenizer = tiny.make_tokenizer()
    assert len(tokenizer) == tiny.VOCABULARY
    for text in ("The capital of France is Paris.", " 你好 🙂\n\tcode(12)"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and max(ids) < tiny.VOCABULARY
    assert len(tokenizer("What is the code word?")["input_ids"]) < 12  # merges are used, not bytes
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert "<|im_start|>user\nhi<|im_end|>" in chat


def test_an_unknown_family_names_those_there_are(tmp_path):
    with pytest.raises(UserError, match="no tiny model of 'bert'") as caught:
        resolve("tiny:bert", "", tmp_path)
    assert "llama" in caught.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "sparktune"])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_each_family_learns(scenarios, tmp_path, family, engine):
    context = Context(tmp_path / "run", Facts.model_construct(), tmp_path / "cache", 0.5)
    result = train.run(scenarios[f"{NAME.format(family)}[engine={engine}]"], context)
    assert result.verdict is Verdict.PASSED, result.reason
