"""Which kernels ran is counted at the launch, and an engine that fell back is told from one that ran."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from sparkproof.engines import marks, tiny
from sparkproof.engines.base import EngineUnavailable, LoadSpec
from sparkproof.engines.liger import LigerEngine, require_liger
from sparkproof.report.verdict import judge
from sparkproof.results import CaseResult, ReasonClass, Verdict
from sparkproof.runners.gate_kernels import judge_kernels
from sparkproof.session import default_cache_dir
from triton.runtime.jit import JITFunction

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def kernel_of(module: str) -> Any:
    """A Triton kernel as a package would define it, and nothing that would run it."""

    def add(x_ptr, n):  # type: ignore[no-untyped-def]
        pass

    add.__module__ = module
    return JITFunction(add)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> marks.Launches:
    """Launches of kernels whose run does nothing; wrapped anew, so that another test's wrapper does not matter."""
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: None)
    monkeypatch.setattr(marks, "_watching", [])
    return marks.Launches()


def test_launches_are_counted_by_the_module_that_defines_the_kernel(launches: marks.Launches) -> None:
    norm, loss = kernel_of("liger_kernel.ops.rms_norm"), kernel_of("liger_kernel.ops.cross_entropy")
    other = kernel_of("somebody.else")
    for kernel in (norm, norm, loss, other):
        kernel[(1,)](None, 0)
    norm.run(None, 0, grid=(1,), warmup=True)
    assert launches.by_module() == {
        "liger_kernel.ops.cross_entropy": 1, "liger_kernel.ops.rms_norm": 2, "somebody.else": 1,
    }  # fmt: skip
    assert launches.of("liger_kernel") == {"rms_norm": {"triton": 2}, "cross_entropy": {"triton": 1}}
    assert launches.of("liger") == {}, "a name that begins alike is another package"
    assert set(launches.foreign()) == {"liger_kernel.ops.rms_norm", "liger_kernel.ops.cross_entropy"}
    launches.reset()
    assert launches.by_module() == {}
    norm[(1,)](None, 0)
    assert launches.of("liger_kernel") == {"rms_norm": {"triton": 1}}


def test_a_second_watch_counts_nothing_twice(launches: marks.Launches) -> None:
    again = marks.Launches()
    kernel_of("unsloth.kernels.swiglu")[(1,)](None, 0)
    assert launches.of("unsloth") == again.of("unsloth") == {"swiglu": {"triton": 1}}


def test_a_kernel_within_a_compiled_layer_counts_for_the_module_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    monkeypatch.setattr(CachingAutotuner, "run", lambda self, *a, **k: None)
    monkeypatch.setattr(marks, "_watching", [])
    marks._home.cache_clear()
    module = types.ModuleType("unsloth.kernels.rope_embedding")
    module._rope_embedding_QK = kernel_of(module.__name__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    launches = marks.Launches()
    for name in ("_rope_embedding_QK", "_rope_embedding_QK", "triton_poi_fused_mul_silu_0", "of_nobody"):
        copy = CachingAutotuner.__new__(CachingAutotuner)
        copy.fn = types.SimpleNamespace(__name__=name)  # type: ignore[assignment]
        copy.run(None, stream=0)
    assert launches.of("unsloth") == {"rope_embedding": {"compiled": 2}, marks.COMPILED: {"compiled": 2}}
    assert set(launches.foreign()) == {"unsloth.kernels.rope_embedding"}
    marks._home.cache_clear()


ASKED = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": True}


def ran(marks: dict[str, int], mode: str = "gpu", **patches: Any) -> dict[str, Any]:
    return {"mode": mode, "patches": patches, "watermarks": {k: {"triton": n} for k, n in marks.items()}}


def missed(engine: str, what: dict[str, Any]) -> list[str]:
    return [a.name for a in judge_kernels(engine, what) if not a.passed]


def test_liger_is_held_to_every_kernel_that_was_asked_for() -> None:
    whole = {"rope": 8, "rms_norm": 20, "swiglu": 8, "cross_entropy": 4}
    assert len(judge_kernels("liger", ran(whole, asked=ASKED))) == 4
    assert missed("liger", ran(whole, asked=ASKED)) == []
    for part, name in (
        ("rms_norm", "norms"),
        ("rope", "rotations"),
        ("swiglu", "activations"),
        ("cross_entropy", "loss"),
    ):
        less = {k: v for k, v in whole.items() if k != part}
        assert missed("liger", ran(less, asked=ASKED)) == [f"Liger: launches of its kernels for {name}"]
    without = {k: v for k, v in ASKED.items() if k != "swiglu"}  # a family whose activation Liger has no kernel for
    assert missed("liger", ran({k: v for k, v in whole.items() if k != "swiglu"}, asked=without)) == []
    assert len(missed("liger", ran({}, asked=ASKED))) == 4


def test_unsloth_is_held_to_its_layers_or_to_anything() -> None:
    llama = {"rms_layernorm": 9, "rope_embedding": 4, "swiglu": 4}
    assert missed("unsloth", ran(llama, family="llama")) == []
    assert missed("unsloth", ran({"rms_layernorm": 9, "swiglu": 4}, family="llama")) == [
        "Unsloth: launches of its kernels for rotations"
    ]
    assert missed("unsloth", ran({"rms_layernorm": 9, "qk_norm_rope": 4, "swiglu": 4}, family="qwen3")) == []
    compiled = {"rms_layernorm": 2, marks.COMPILED: 900}
    assert len(missed("unsloth", ran(compiled, family="llama"))) == 2, "no layer says that it is compiled"
    assert missed("unsloth", ran(compiled, family="llama", **{"compiled whole": ["LlamaDecoderLayer"]})) == []
    assert len(missed("unsloth", ran({}, family="llama", **{"compiled whole": ["LlamaDecoderLayer"]}))) == 3
    assert missed("unsloth", ran({marks.COMPILED: 3}, family="gpt_oss")) == []
    assert missed("unsloth", ran({}, family="gpt_oss")) == ["Unsloth: launches of its kernels for anything"]


def test_hf_may_launch_nobodys_kernels() -> None:
    assert missed("hf", ran({})) == []
    assert missed("hf", ran({"unsloth.kernels.swiglu": 2})) == ["kernels of other engines that hf launched"]
    assert judge_kernels("hf", ran({}, mode="host")) == [], "without a GPU nothing is launched"


def stand_in(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]) -> list[dict[str, bool]]:
    """A liger_kernel with the table that the adapter reads; what it was asked for."""
    asked: list[dict[str, bool]] = []

    def apply(
        rope: bool = True, rms_norm: bool = True, swiglu: bool = True, fused_linear_cross_entropy: bool = True
    ) -> None:
        asked.append({"rope": rope, "rms_norm": rms_norm, "swiglu": swiglu, "loss": fused_linear_cross_entropy})

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    table = dict.fromkeys(kinds, apply)
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = table  # type: ignore[attr-defined]
    return asked


def test_the_liger_adapter_asks_for_what_this_kind_of_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, ("llama",))
    engine, spec = LigerEngine(), _spec("llama")
    model = engine.add_lora(engine.load(spec)[0], spec)
    assert asked == [{"rope": True, "rms_norm": True, "swiglu": True, "loss": True}]
    seen = engine.ran(model)
    assert seen.patches["asked"] == {"rope": True, "rms_norm": True, "swiglu": True, "fused_linear_cross_entropy": True}
    assert len(missed("liger", vars(seen))) == 4, "the stand-in patched nothing, and that is no run of Liger"
    with pytest.raises(EngineUnavailable, match="no kernels for models of type 'gpt_oss'") as caught:
        LigerEngine().load(_spec("gpt_oss"))
    assert caught.value.skip_class == "no-engine"


def _spec(family: str) -> LoadSpec:
    folder = tiny.tiny(f"tiny:{family}", default_cache_dir()).path
    return LoadSpec(folder, False, 64, 4, 8.0, SEVEN, device="cpu")


def test_checkpointing_is_the_engines_own_and_changes_no_gradient() -> None:
    from sparkproof.engines.base import lora_parameters, seed_lora
    from sparkproof.engines.registry import engine

    ids = torch.arange(24).reshape(2, 12)
    for name in ("hf", "sparktune"):
        grads = []
        for checkpointing in (False, True):
            spec = LoadSpec(_spec("llama").folder, True, 64, 4, 8.0, SEVEN, device="cpu", checkpointing=checkpointing)
            adapter = engine(name)
            model = adapter.add_lora(adapter.load(spec)[0], spec)
            seed_lora(model, 1, 0.02)
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in lora_parameters(model).values()]))  # type: ignore[union-attr]
        assert torch.allclose(*grads, rtol=1e-4, atol=1e-6) and grads[0].abs().max() > 0, name


def test_liger_where_it_can_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match="Liger-Kernel is not installed") as caught:
        require_liger()
    assert caught.value.skip_class == "no-engine" and "pip install liger-kernel" in caught.value.fix
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="needs a GPU") as caught:
        require_liger()
    assert caught.value.skip_class == "no-gpu"


def test_an_engine_that_nobody_installed_does_not_invalidate_a_spark(tmp_path: Path) -> None:
    from report_sample import case, good_results, spark

    skipped = CaseResult(
        name="train/x[engine=liger]", kind="train", verdict=Verdict.SKIPPED, reason_class=ReasonClass.ENGINE
    )
    more: dict[str, Any] = {
        "missing": [],
        "profile": "quick",
        "whole_profile": True,
        "interrupted": False,
        "ended": True,
    }
    found = judge(facts=spark(), results=[*good_results(), skipped], **more)
    assert found.validated and "1 case of engines that are not installed did not run" in found.sentence
    needed = case("train/y", "train", Verdict.SKIPPED, assertions=[], reason_class=ReasonClass.SOFTWARE)
    assert not judge(facts=spark(), results=[*good_results(), skipped, needed], **more).validated
