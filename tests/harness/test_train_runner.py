"""The runner on a tiny Llama: each phase runs the real engine, in this process or in one of its own.

The tiny model has random weights, so what it can learn in a few steps is little; the gates here are set for it.
"""

import json
import shutil
from pathlib import Path

import pytest
import tiny_llama
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.results import Verdict
from sparkproof.runners import train, train_child
from sparkproof.runners.base import Context
from sparkproof.runners.process import Outcome
from sparkproof.scenario import Case

CANARY = ("w?", "7319")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "talk.jsonl"
    pairs = [(f"q{i}", f"yes {i % 3}") for i in range(30)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def make_case(model, talk, name="train/tiny", **changes):
    gate = {
        "first_loss": [4, 10],
        "first_grad_norm": [0.01, 50],
        "min_loss_fall": 0.3,
        "canary_prompt": CANARY[0],
        "canary_answer": CANARY[1],
        "repeat_steps": 2,
        **changes.pop("gate", {}),
    }
    scenario = {
        "kind": "train",
        "summary": "a tiny model for tests",
        "model": str(model),
        "dataset": str(talk),
        "steps": 60,
        "batch": 2,
        "learning_rate": 1e-2,
        "lora": {"rank": 16, "alpha": 32},
        "timeout_s": 240,
        "gate": gate,
        **changes,
    }
    return Case(name=name, file="tiny.yaml", scenario=scenario)


class InProcess(Context):
    """A context whose phases run here: the code is the same, only the process is not fresh."""

    def spawn(self, entry, payload, *, case, phase, timeout_s, env=None):
        self.phases = [*getattr(self, "phases", []), phase]
        payload = json.loads(json.dumps(payload))
        result = getattr(train_child, entry.partition(":")[2])(payload)
        return Outcome(status="ok", result=json.loads(json.dumps(result)), peak_rss_gib=1.0)


@pytest.fixture
def context(tmp_path):
    return InProcess(tmp_path / "run", Facts.model_construct(), tmp_path / "cache", 0.5)


@pytest.fixture(scope="module")
def learnt(model, talk, tmp_path_factory):
    """One run of each engine that runs on a CPU, sharing a run folder."""
    root = tmp_path_factory.mktemp("learnt")
    context = InProcess(root / "run", Facts.model_construct(), root / "cache", 0.5)
    cases = {
        engine: make_case(model, talk, f"train/tiny[engine={engine}]", engine=engine) for engine in ("hf", "sparktune")
    }
    return context, cases, {engine: train.run(case, context) for engine, case in cases.items()}


def rows(result):
    return {a.name: a for a in result.assertions}


class WithoutAgain(InProcess):
    """Where the process after the training ends badly."""

    def spawn(self, entry, payload, *, case, phase, timeout_s, env=None):
        if phase == "again":
            return Outcome(status="died", returncode=-9, log="again.log", duration_s=1.5)
        return super().spawn(entry, payload, case=case, phase=phase, timeout_s=timeout_s, env=env)


def test_what_was_measured_is_kept_when_a_later_process_dies(model, talk, tmp_path):
    context = WithoutAgain(tmp_path / "run", Facts.model_construct(), tmp_path / "cache", 0.5)
    result = train.run(make_case(model, talk, "train/tiny[engine=hf]", engine="hf", steps=8), context)
    assert result.verdict is Verdict.FAILED and "again died" in result.reason
    assert {"tokens_per_s", "step_p50_ms"} <= {m.name for m in result.measurements}
    assert len(result.evidence["loss"]) == 8 and result.evidence["subject"]["engine"] == "hf"
    assert result.evidence["seconds of phases"]["again"] == 1.5


@pytest.mark.parametrize("engine", ["hf", "sparktune"])
def test_a_tiny_model_learns_and_every_rule_was_applied(learnt, engine):
    result = learnt[2][engine]
    assert result.verdict is Verdict.PASSED, result.reason
    expected = {
        "first loss",
        "first gradient norm",
        "loss fall, first fifth to last fifth",
        "LoRA B tensors that are still zero",
        "frozen base unchanged",
        "canary before training",
        "canary after training",
        "adapter tensors that read back different",
        "logits after reading back",
        "steps that repeat bit for bit in a fresh process",
    }
    assert expected <= rows(result).keys()
    assert len(result.evidence["loss"]) == 60
    names = {m.name for m in result.measurements}
    assert {"tokens_per_s", "step_p50_ms", "step_p95_ms", "load_s", "peak_rss_gib"} <= names


def test_hf_is_held_to_plain_pytorch_and_sparktune_to_hf(learnt):
    assert learnt[2]["hf"].evidence["parity"]["reference"] == "plain PyTorch over the same weights"
    assert learnt[2]["sparktune"].evidence["parity"]["reference"] == "hf"
    for result in learnt[2].values():
        assert result.evidence["parity"]["fp32"]["tensors"] == 2 * 7 * 2
        assert result.evidence["parity"]["fp32"]["relative"] < 1e-4


def test_without_a_gpu_sparktune_says_that_references_ran(learnt):
    result = learnt[2]["sparktune"]
    if result.mode == "gpu":
        pytest.skip("a GPU is here, so kernels ran")
    assert result.mode == "reference"
    assert "references ran" in result.notices[0]
    marks = result.evidence["watermarks"]
    ran = {"rms_norm", "add_rms_norm", "rope", "lora_qkv", "lora_linear", "lora_mlp", "linear_cross_entropy"}
    assert set(marks) >= ran
    assert not any(counts["triton"] for counts in marks.values())
    assert all(counts["reference"] > 0 for counts in marks.values())
    assert result.evidence["patches"]["patched"] == {
        "linear_cross_entropy": 1, "documents": 1, "add_rms_norm": 2, "lora_qkv": 2, "lora_mlp": 2, "rms_norm": 5,
        "rope": 1, "dequantize_4bit": 14,
    }  # fmt: skip


def test_both_engines_were_fed_the_same_and_began_the_same(learnt):
    hf, ours = (learnt[2][e].evidence for e in ("hf", "sparktune"))
    assert hf["data"]["digest"] == ours["data"]["digest"]
    assert hf["loss"][0] == pytest.approx(ours["loss"][0], abs=1e-4)


def test_the_adapter_is_peft_with_an_account(learnt):
    context, cases, _ = learnt
    folder = train.ensure_trained(cases["hf"], context)
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "train.json"}
    account = json.loads((folder / "train.json").read_text())
    assert account["canary"] == {"prompt": CANARY[0], "answer": CANARY[1]}
    assert account["base"]["source"] == "folder"
    assert Path(account["base"]["path"]).is_dir()


def test_a_case_is_trained_once_a_run(learnt):
    context, cases, results = learnt
    before = list(context.phases)
    again = train.run(cases["sparktune"], context)
    assert context.phases == before == ["train", "again", "train", "again"]  # hf's gradients are the reference
    assert again.model_dump() == results["sparktune"].model_dump()


def test_another_scenario_is_trained_anew(model, talk, context):
    calls = []
    context.spawn = lambda *a, phase, **k: calls.append(phase) or Outcome(status="timeout", duration_s=1)
    for steps in (5, 6):
        train.run(make_case(model, talk, steps=steps), context)
    assert calls == ["train", "train"]


def test_what_did_not_learn_fails_and_is_not_exported(model, talk, context):
    case = make_case(model, talk, steps=30, learning_rate=1e-9)  # fifths of 6 steps hold equally many canaries
    result = train.run(case, context)
    assert result.verdict is Verdict.FAILED
    missed = {name for name, a in rows(result).items() if not a.passed}
    assert missed >= {"loss fall, first fifth to last fifth", "canary after training"}
    with pytest.raises(UserError, match="ended as failed") as caught:
        train.ensure_trained(case, context)
    assert caught.value.skip_class == "upstream-case"


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome(status="timeout", duration_s=3), Verdict.FAILED),
        (Outcome(status="memory"), Verdict.FAILED),
        (Outcome(status="died", returncode=-11), Verdict.FAILED),
        (Outcome(status="error", error_type="RuntimeError", error="x", stage="training"), Verdict.FAILED),
        (Outcome(status="error", error_type="KeyError", error="x"), Verdict.BROKEN),
    ],
)
def test_a_phase_without_a_result_never_passes(model, talk, context, outcome, verdict):
    context.spawn = lambda *args, **kwargs: outcome
    result = train.run(make_case(model, talk), context)
    assert result.verdict is verdict
    assert result.reason and result.next_step
    assert not (context.case_dir(make_case(model, talk)) / "train-result.json").exists()


def test_a_model_that_does_not_exist_is_one_sentence(talk, context):
    with pytest.raises(UserError, match=r"model folder '/nowhere/model' does not exist\."):
        train.run(make_case("/nowhere/model", talk), context)


def test_unsloth_where_it_is_not_installed(model, talk, context, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match="Unsloth is not installed") as caught:
        train.run(make_case(model, talk, engine="unsloth"), context)
    assert caught.value.skip_class == "no-engine"


@pytest.mark.slow
def test_in_fresh_processes(model, talk, tmp_path):
    """The whole way once, with real processes, progress and the environment that they get."""
    told = []
    context = Context(tmp_path / "run", Facts.model_construct(), tmp_path / "cache", 0.5, progress=told.append)
    case = make_case(model, talk, engine="hf")
    result = train.run(case, context)
    assert result.verdict is Verdict.PASSED, (result.reason, result.output_tail)
    assert rows(result)["steps that repeat bit for bit in a fresh process"].value == 2
    assert any("loss" in text for text in told)
    shutil.rmtree(context.case_dir(case) / "adapter")


@pytest.mark.parametrize(
    ("engine", "where", "wrong"),
    [
        ("sparktune", "sparktune.ops.swiglu.reference", lambda gate, up: gate.relu() * up),
        ("sparktune", "sparktune.models.parts.rms_norm", lambda x, weight, eps, variant: x * weight),
        ("hf", "bitsandbytes.matmul_4bit", None),
    ],
)
def test_wrong_arithmetic_is_caught_by_parity(model, talk, context, monkeypatch, engine, where, wrong):
    if wrong is None:
        import bitsandbytes

        right = bitsandbytes.matmul_4bit

        def wrong(x, weight, **more):
            return right(x, weight, **more) * 1.1

    monkeypatch.setattr(where, wrong)
    result = train.run(make_case(model, talk, engine=engine, steps=5), context)
    missed = [name for name, a in rows(result).items() if not a.passed]
    assert any(name.startswith("LoRA gradients, distance from") for name in missed), missed


@pytest.mark.parametrize("engine", ["hf", "sparktune"])
def test_where_training_is_in_bf16_both_comparisons_are_made(model, talk, context, monkeypatch, engine):
    """What a GPU chooses, forced here: fp32 is compared closely, bf16 by the reference's own error."""
    monkeypatch.setattr("sparkproof.engines.base.native_compute", lambda: "bf16")
    result = train.run(make_case(model, talk, engine=engine, steps=12), context)
    parity = result.evidence["parity"]
    assert parity["fp32"]["relative"] < 1e-4
    assert 1e-3 < parity["bf16"]["reference_relative"] < 0.5
    judged = {name: a.passed for name, a in rows(result).items() if "distance from" in name}
    assert len([name for name in judged if "distance from hf" in name or "distance from plain" in name]) == 4
    assert len([name for name in judged if name.endswith("from one batch, fp32")]) == 2
    assert all(judged.values())
    assert rows(result)["steps that repeat bit for bit in a fresh process"].passed
    assert rows(result)["logits after reading back"].passed
