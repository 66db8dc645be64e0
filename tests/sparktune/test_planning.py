"""The plan: a model's own sizes, parts that add up, and what a budget buys."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import families
import pytest
import sparktune
import torch
from sparktune.models.checkpointing import NORMS, WEIGHTS
from sparktune.planning import GB10, H100, Ceilings, ModelShape, plan
from torch import nn

LLAMA = ModelShape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256)
INF = float("inf")
KINDS = ("attention", "residual", "qkv", "gate_up")


@pytest.mark.parametrize("family", ["llama", "llama3-rope", "qwen3", "mistral"])
def test_a_shape_counts_the_models_own_elements(family):
    model = families.build(family)
    shape = ModelShape.of(model)
    projections = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert shape.layer_weights * shape.layers == projections
    assert shape.tied == (family == "llama3-rope")
    assert shape.vocabulary * shape.hidden == model.get_input_embeddings().weight.numel()
    lora = families.with_lora(model)
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert shape.lora_elements(4) * shape.layers == trained
    assert shape.head_norms == any("q_norm" in n for n, _ in model.named_parameters())


def test_experts_are_refused_rather_than_guessed():
    from transformers import Qwen3MoeConfig

    with pytest.raises(ValueError, match=r"dense decoders only.*num_experts"):
        plan(Qwen3MoeConfig(num_experts=4))


@pytest.mark.parametrize("device", [H100, GB10])
def test_weights_and_products_of_llama_are_what_arithmetic_says(device):
    p = plan(LLAMA, device)
    weights = 32 * (4096 * 6144 + 4096**2 + 3 * 4096 * 14336)
    assert p.bytes["weights"] == pytest.approx(weights * (0.5 + 1 / 64 + 1 / 4096))
    assert p.ms["products"] == pytest.approx(2 * 2 * 4096 * weights / device.gemm * 1e3)
    assert p.step_ms == pytest.approx(sum(p.ms.values()))
    assert p.tokens_per_s == pytest.approx(4096 / p.step_ms * 1e3)
    assert p.peak == sum(p.bytes.values())
    assert min(*p.bytes.values(), *p.ms.values()) >= 0
    bf16 = plan(LLAMA, device, load_in_4bit=False)
    assert bf16.bytes["weights"] == 2 * weights
    assert bf16.ms["dequantisation"] == 0


def test_memory_buys_time_and_never_more_than_it_costs():
    plans = [plan(LLAMA, "h100", budget=b) for b in (0, 2e9, 5e9, INF)]
    assert [p.step_ms for p in plans] == sorted((p.step_ms for p in plans), reverse=True)
    assert set(plans[0].kept.values()) <= {0, 1}  # of the last layer, in room that the loss leaves
    assert plans[0].kept["gate_up"] == 1
    assert plans[0].bytes["kept activations"] == 0
    assert plans[3].kept == dict.fromkeys((*KINDS, WEIGHTS, NORMS), 32)
    assert plans[3].ms["dequantisation"] == 0
    assert plans[3].bytes["weights kept in 16 bits"] == pytest.approx(2 * LLAMA.layer_weights * 32, rel=0.02)
    assert all(p.bytes["weights kept in 16 bits"] == 0 for p in plans[:3])
    assert plans[3].ms["products again"] == 0
    for p, budget in zip(plans[:3], (0, 2e9, 5e9), strict=True):
        assert p.bytes["kept activations"] <= budget
    assert plans[3].peak > plans[0].peak


def test_without_checkpointing_all_activations_stay_and_no_weights_do():
    p, most = plan(LLAMA, "h100", checkpointing=False), plan(LLAMA, "h100", budget=INF)
    assert p.kept == {**dict.fromkeys(KINDS, 32), WEIGHTS: 0, NORMS: 0}
    assert p.bytes["weights kept in 16 bits"] == 0
    norms = 32 * most.batch * most.sequence * LLAMA.layer().bytes_of(NORMS)
    assert p.bytes["kept activations"] == most.bytes["kept activations"] - norms
    assert p.ms["dequantisation"] > 0 and p.ms["products again"] == 0


def test_packed_documents_cost_less_attention_and_nothing_else():
    one, many = (plan(LLAMA, "h100", sequence=4096, documents=n, budget=INF) for n in (1, 16))
    assert many.ms["attention"] == pytest.approx(one.ms["attention"] / 16)
    assert {k: v for k, v in many.ms.items() if k != "attention"} == {
        k: v for k, v in one.ms.items() if k != "attention"
    }


def test_it_says_whether_it_rests_on_measurements_and_whether_it_fits():
    assert str(plan(LLAMA, "h100")).startswith("Predicted: Llama-3.1-8B, 2 x 2048 tokens on H100")
    text = str(plan(LLAMA, "gb10", batch=8, sequence=16384, budget=INF))
    assert "figures that were not measured" in text
    assert "does not fit" in text
    assert sparktune.plan is plan


def test_wrong_questions_are_named():
    with pytest.raises(ValueError, match="no ceilings for 'b200': known are h100, gb10"):
        plan(LLAMA, "b200")
    with pytest.raises(ValueError, match="1 or more"):
        plan(LLAMA, batch=0)
    with pytest.raises(ValueError, match="above 0"):
        Ceilings("x", 1.0, 1.0, 1.0, 0.0, 1.0, 1, "", True)
    assert torch.isfinite(torch.tensor(plan(replace(LLAMA, layers=1), documents=4096).step_ms))


def test_what_waits_in_host_memory_buys_time_for_no_memory_of_the_device():
    here, there = plan(LLAMA, "h100", budget=1e9), plan(LLAMA, "h100", budget=1e9, offload=True)
    assert there.peak < here.peak and there.step_ms < here.step_ms
    assert there.kept["residual"] == 32 and there.bytes["kept activations"] <= 1e9
    without = plan(LLAMA, "h100", checkpointing=False)
    assert plan(LLAMA, "h100", checkpointing=False, offload=True).bytes == without.bytes  # then nothing goes there
    table = plan(LLAMA, "h100", budget=1e9, offload=True, offload_embedding=True)
    assert table.peak == pytest.approx(there.peak - 128256 * 4096 * 2)
    with pytest.raises(ValueError, match="nothing is kept in host memory for GB10"):
        plan(LLAMA, "gb10", offload=True)


def test_long_batches_need_room_for_a_strip_of_their_mlp_and_spend_a_budget_in_strips():
    """What a backward has besides what is kept grows by the rows of the residual stream, not by those of gate and up."""
    short, long = (plan(LLAMA, "h100", batch=b, sequence=4096) for b in (1, 4))
    rows = 3 * 4096
    gate_up = rows * 3 * 14336 * 2
    assert long.bytes["temporary"] - short.bytes["temporary"] < gate_up
    assert (
        long.ms["dequantisation"] < short.ms["dequantisation"]
    )  # one buffer for gate and up again, and their gradient
    some = plan(LLAMA, "h100", batch=4, sequence=4096, budget=20e9)
    assert 0 < some.kept["gate_up"] % 1 < 1 and some.kept["gate_up"] * 8 == int(some.kept["gate_up"] * 8)


YARDSTICK = Path(__file__).parents[2] / "reports/published/yardstick"
SHAPES = {"llama31-8b": LLAMA, "qwen3-8b": ModelShape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, head_norms=True)}


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        ("llama31-8b_8l_2x2048", ""),
        ("llama31-8b_8l_2x2048_host_embedding", "table"),
        ("llama31-8b_8l_2x2048_host_memory", "all"),
        ("llama31-8b_8l_2x2048_budget", ""),
        ("llama31-8b_32l_2x2048_host_memory", "all"),
        ("llama31-8b_32l_2x2048_budget", ""),
        ("llama31-8b_32l_4x4096_host_memory", "all"),
        ("llama31-8b_32l_4x4096_budget", ""),
        ("llama31-8b_8l_4x4096_host_memory", "all"),
        ("llama31-8b_8l_4x4096_budget", ""),
        ("llama31-8b_8l_2x2048_packed16_host_memory", "all"),
        ("qwen3-8b_8l_2x2048_budget", ""),
        ("qwen3-8b_8l_4x4096_budget", ""),
        ("qwen3-8b_8l_4x4096_host_memory", "all"),
        ("qwen3-8b_36l_2x2048_host_memory", "all"),
        ("qwen3-8b_36l_2x2048_budget", ""),
    ],
)
def test_measured_steps_are_as_planned(name, offload):
    """Memory within 5% and time within 15%, of steps on a card of an H100's multiprocessors."""
    document = json.loads((YARDSTICK / f"{name}.json").read_text())
    c = document["config"]
    ours = [r for r in document["results"] if r["engine"].startswith("ours")]
    shape = replace(SHAPES[c["model"]], layers=c["layers"] or SHAPES[c["model"]].layers)
    budgets = {r["notes"]["budget_gib"] for r in ours}  # with the embedding's room, where that is in host memory
    batch, sequence = (1, c["batch"] * c["seq"]) if c["packed"] else (c["batch"], c["seq"])
    p = plan(
        shape, "h100", batch=batch, sequence=sequence, documents=c["packed"] or 1, budget=float(min(budgets)) * 2**30,
        offload=offload == "all", offload_embedding=bool(offload),
    )  # fmt: skip
    assert len(budgets) == 1
    assert p.peak / 2**30 == pytest.approx(max(r["warmup_peak_alloc_gib"] for r in ours), rel=0.05)
    assert p.step_ms == pytest.approx(statistics.median(r["step_ms"] for r in ours), rel=0.15)
