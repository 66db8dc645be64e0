import pytest
import torch
from sparkproof.engines.account import lora_account, tensor_digests
from sparkproof.engines.base import EngineUnavailable, LoadSpec, lora_parameters, seed_lora
from sparkproof.engines.hf import HfEngine
from sparkproof.engines.loop import rate
from sparkproof.engines.registry import NAMES, engine
from sparkproof.errors import UserError
from sparkproof.scenario import EngineName
from tiny_llama import make_model

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def model(tmp_path):
    spec = LoadSpec(tmp_path, False, 64, 4, 8.0, SEVEN, device="cpu")
    return HfEngine().add_lora(make_model(), spec)


def test_engine_names_are_those_of_the_schema():
    assert set(NAMES) == set(EngineName.__args__)


def test_engines_that_run_anywhere():
    assert engine("hf").name == "hf"
    assert engine("sparktune").name == "sparktune"


@pytest.mark.parametrize(("wrong", "near"), [("unsloht", "unsloth"), ("sparktunes", "sparktune"), ("hff", "hf")])
def test_an_unknown_engine_gets_the_nearest_name(wrong, near):
    with pytest.raises(UserError) as caught:
        engine(wrong)
    assert f"'{wrong}'" in caught.value.message
    assert f"Did you mean '{near}'" in caught.value.fix


def test_engines_that_are_not_here_say_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("unsloth", "liger"):
        with pytest.raises(EngineUnavailable, match=f"pip install {name}") as caught:
            engine(name)
        assert caught.value.skip_class == "no-engine"


def test_unsloth_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="needs a GPU") as caught:
        engine("unsloth")
    assert caught.value.skip_class == "no-gpu"


def test_lora_is_found_by_names_that_no_wrapper_changes(model):
    names = list(lora_parameters(model))
    assert len(names) == 2 * 7 * 2
    assert names[0] == "layers.0.mlp.down_proj.lora_A"
    wrapped = torch.nn.ModuleDict({"base_model": torch.nn.ModuleDict({"model": model})})
    assert list(lora_parameters(wrapped)) == names


def test_initial_values_depend_on_seed_and_name_alone(model):
    seed_lora(model, 7)
    first = tensor_digests(model)
    torch.manual_seed(99)
    seed_lora(model, 8)
    assert tensor_digests(model).keys() == first.keys()
    changed = [n for n, d in tensor_digests(model).items() if d != first[n]]
    assert changed == [n for n in first if n.endswith("lora_A")]
    seed_lora(model, 7)
    assert tensor_digests(model) == first
    assert len({d for n, d in first.items() if n.endswith("lora_A")}) == 14
    values = lora_parameters(model)
    assert not any(p.any() for n, p in values.items() if n.endswith("lora_B"))
    a = values["layers.0.self_attn.q_proj.lora_A"]
    assert 0.1 < a.abs().max() <= 1 / 8
    seed_lora(model, 7, b_scale=0.02)
    assert all(p.any() for n, p in lora_parameters(model).items() if n.endswith("lora_B"))


def test_the_account_names_what_has_no_lora_and_what_else_is_trained(model):
    account = lora_account(model, SEVEN)
    assert (account["targeted"], account["tensors"], account["without_lora"], account["other_trainable"]) == (
        14,
        28,
        [],
        [],
    )
    assert len(account["b_zero"]) == 14
    missing = lora_account(model, (*SEVEN, "lm_head"))
    assert [name.split(".")[-1] for name in missing["without_lora"]] == ["lm_head"]
    model.base_model.model.model.norm.weight.requires_grad_(True)
    assert len(lora_account(model, SEVEN)["other_trainable"]) == 1
    for parameter in lora_parameters(model).values():
        parameter.requires_grad_(False)
    frozen = lora_account(model, SEVEN)
    assert (len(frozen["frozen"]), frozen["without_lora"]) == (28, [])  # LoRA is there, and can't learn


def test_the_learning_rate_rises_then_falls():
    rates = [rate(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 < rates[-1] < 0.15
    assert rate(0, 5) == 1.0
