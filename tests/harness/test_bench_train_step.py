"""One training step as `sparkproof bench train` measures it: what it is made of, its floor, and the whole road once on a CPU."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from sparkproof.bench.train import calibrate, engines, step, views
from sparkproof.bench.train.document import Document, EngineSteps, train_schema
from sparkproof.bench.train.run import Bench
from sparkproof.bench.train.setting import SHAPES, Setting, child_environment
from sparkproof.cli import app
from sparkproof.judge import nested, stats
from typer.testing import CliRunner


def tiny(**more: Any) -> Setting:
    base = {"model": "tiny", "layers": 2, "batch": 2, "seq": 32, "rank": 4, "gc": "on", "steps": 3, "warmup": 1}
    return Setting.model_validate({**base, "device": "cuda", **more})


def by_name(d: Document) -> dict[str, EngineSteps]:
    return {e.name: e for e in d.models[0].engines}


@pytest.mark.slow  # 33 s: four processes that import everything
def test_the_whole_road_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    line = "--device cpu --model tiny --packed 2 --seq 32 --rank 4 --steps 2 --warmup 1 --rounds 1 --json --out"
    found = CliRunner().invoke(app, ["bench", "train", *line.split(), str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    d = Document.model_validate_json(found.stdout)
    jsonschema.Draft202012Validator(json.loads(train_schema())).validate(json.loads(found.stdout))
    assert (d.device, d.device_type, d.trusted, d.partial) == ("CPU", "cpu", False, "")
    e = by_name(d)
    assert [x.status for x in e.values()] == ["timed", "missing", "missing", "timed"]
    for x in (e["hf"], e["sparktune"]):
        (r,) = x.rounds
        assert len(r.step_ms) == 2 and len(r.loss) == 3 and len(r.gradient_norm) == 1
        assert r.trainable == 2 * 4 * sum(n + k for n, k in SHAPES["tiny"].linears.values())
        assert r.loss[0] == pytest.approx(math.log(1024), abs=0.5) and r.first_step_s > 0 and not r.failures
        assert x.memory.peak_allocated_gib is None
    assert e["sparktune"].loss_difference is not None and e["sparktune"].loss_difference < 1e-3
    assert e["sparktune"].norm_difference is not None and e["sparktune"].norm_difference < 5e-3
    assert e["hf"].rounds[0].loss[0] != e["hf"].rounds[0].loss[1]
    marks = e["sparktune"].rounds[0].notes["watermarks"]
    assert marks["lora_mlp"]["reference"] > 0 and marks["lora_mlp"]["triton"] == 0
    assert e["sparktune"].rounds[0].notes["fallbacks"] == {}
    m = d.models[0]
    assert m.floor is None and m.verdict == "" and m.best_other == "hf" and m.against_best is not None
    assert "Measured on a CPU" in views.tally(d) and "by reference: " in views.remarks(d)[0]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"bench-train.{x}" for x in ("html", "json", "md")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_whole_road_on_a_gpu() -> None:
    pytest.importorskip("bitsandbytes")
    d = Bench([tiny(model="llama32-1b", seq=512)], ("hf", "sparktune"), rounds=1).run()
    e = by_name(d)
    assert [x.status for x in e.values()] == ["timed", "timed"], views.problems(d)
    assert d.models[0].floor is not None and 0 < (e["sparktune"].light or 0) < 1
    for x in e.values():
        assert not x.rounds[0].failures
        assert (x.memory.peak_reserved_gib or 0) >= (x.memory.peak_allocated_gib or 0) > (x.memory.weights_gib or 0) > 0
    marks = e["sparktune"].rounds[0].notes["watermarks"]
    assert all(ways["reference"] == 0 for ways in marks.values()) and marks["lora_mlp"]["triton"] > 0


def test_rounds_are_drawn_whole() -> None:
    groups = [[10.0, 10.1, 9.9], [12.0, 12.1, 11.9], [11.0, 11.1, 10.9]]
    found, flat = nested.median(groups), stats.median([x for g in groups for x in g])
    assert found.value == 11.0 and found.low < 10.1 and found.high > 11.9
    assert flat.low > found.low or flat.high < found.high
    assert nested.median(groups[:1]) == stats.Interval(10.0, 9.9, 10.1)
    again = nested.ratio(groups, groups)
    assert again.value == 1.0 and again.spans(1.0) and again.low < 0.95 and again.high > 1.05
    with pytest.raises(statistics.StatisticsError):
        nested.median([])


def test_useful_work_follows_from_the_shape() -> None:
    whole = tiny(model="llama31-8b", layers=32, batch=2, seq=2048, rank=16)
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert whole.useful_tflop() == pytest.approx(
        (4 * 4096 * weights + 3 * 2 * 4096 * 41_943_040 + 7 * 2 * 32 * 32 * 2048**2 * 128 + 4 * 4096 * 4096 * 128256)
        / 1e12
    )
    packed = whole.model_copy(update={"packed": 3})
    assert packed.documents() == [1365, 1365, 1366] and packed.rows() == (1, 4096)
    assert packed.useful_tflop() < whole.useful_tflop()


def test_batches_predict_neither_prompts_nor_across_documents() -> None:
    s = tiny(device="cpu", seq=32, packed=3)
    ((ids, labels, positions, lengths),) = step.batches(s, 1)
    assert ids.shape == labels.shape == (1, 64) and lengths == [21, 21, 22] and positions is not None
    assert positions[0].tolist() == [*range(21), *range(21), *range(22)]
    assert (labels[0] == -100).nonzero().flatten().tolist() == [0, 1, 2, 3, 21, 42]
    assert step.labelled_tokens(s) == 58 and step.labelled_tokens(tiny()) == 60
    again = step.batches(s, 1)[0][0]
    assert torch.equal(ids, again)


def test_a_lora_parameter_has_one_name_in_every_engine() -> None:
    want = "layers.3.mlp.up_proj.lora_A"
    for prefix in ("base_model.model.model.", "model.", ""):
        for suffix in (".default.weight", ".weight", ""):
            assert step.lora_name(f"{prefix}layers.3.mlp.up_proj.lora_A{suffix}") == want
    with pytest.raises(ValueError, match="outside"):
        step.lora_name("lm_head.lora_A.weight")


def test_the_floor_counts_each_product_once_and_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    s = tiny(model="qwen3-8b", layers=4, seq=4096)
    monkeypatch.setattr(calibrate, "product", lambda m, n, k: (m * n * k / 1e12, m * n * k / 1e12))
    parts, shape, m = calibrate.products(s), SHAPES["qwen3-8b"], 8192
    one = {n: m * a * b / 1e12 for n, (a, b) in shape.linears.items()}
    qkv = one["self_attn.q_proj"] + 2 * one["self_attn.k_proj"]
    assert parts["qkv"] == pytest.approx(7 * qkv) and parts["o"] == pytest.approx(8 * one["self_attn.o_proj"])
    assert parts["gate and up"] == pytest.approx(16 * one["mlp.gate_proj"])
    assert parts["head"] == pytest.approx(2 * step.labelled_tokens(s) * shape.vocab * shape.hidden / 1e12)
    slow = {(4096 + 2 * 1024, 4096): 10.0, (2 * 12288, 4096): 0.5}
    monkeypatch.setattr(calibrate, "product", lambda m, n, k: (slow.get((n, k), 1.0),) * 2)
    parts = calibrate.products(s)
    assert parts["qkv"] == 7 * 3.0 and parts["gate and up"] == 4 * 2 * 0.5

    def attend(setting: Setting, rows: int, columns: int) -> tuple[float, float]:
        assert (rows, columns) == (3, 2730)
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no such kernel\nmore")
        return (2.0, 4.0) if len(calls) == 2 else (1.0, 6.0)

    calls: list[int] = []
    monkeypatch.setattr(calibrate, "_attention", attend)
    ways, best = calibrate.attention(s.model_copy(update={"packed": 3}))
    assert ways["flash"] == "RuntimeError: no such kernel" and best == pytest.approx(6.0, rel=1e-3) and best > 6.0
    calls.extend([1] * 10)
    monkeypatch.setattr(calibrate, "_attention", lambda *a: 1 / 0)
    with pytest.raises(RuntimeError, match="no attention backend"):
        calibrate.attention(s)


def test_what_is_only_nice_to_know_loses_no_step() -> None:
    failures: dict[str, str] = {}
    with step.optional("peaks", failures):
        raise RuntimeError("not on this device")
    assert failures == {"peaks": "RuntimeError: not on this device"}
    assert step._plain({"a": {1: math.inf}, "b": (1, object)}) == {"a": {"1": "inf"}, "b": [1, str(object)]}


def test_an_engines_own_roots_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    env = child_environment(["/opt/unsloth"], "kernels:harness")
    assert env["PYTHONPATH"].split(":") == [
        "/opt/unsloth",
        str(Path("kernels").absolute()),
        str(Path("harness").absolute()),
    ]
    assert env["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in child_environment([], "")
    monkeypatch.setitem(engines.PACKAGES, "liger", "no_such_package")
    with pytest.raises(engines.NotInstalled, match="--site liger=DIR"):
        engines.first_import("liger")
