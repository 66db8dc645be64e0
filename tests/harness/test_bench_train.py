"""`sparkproof bench train` without a GPU: the whole road once on a CPU, then its parent over a stand-in for its worker."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.console import Console
from sparkproof.bench.train import calibrate, compare, engines, run, step, views
from sparkproof.bench.train.document import Document, EngineSteps, ModelSteps, train_schema
from sparkproof.bench.train.run import Bench
from sparkproof.bench.train.setting import NAMES, SHAPES, Setting, child_environment
from sparkproof.cli import app, bench_train, main
from sparkproof.judge import nested, stats
from typer.testing import CliRunner

FAKE = Path(__file__).with_name("fake_bench_worker.py")
Plan = dict[str, dict[str, Any]]


def tiny(**more: Any) -> Setting:
    base = {"model": "tiny", "layers": 2, "batch": 2, "seq": 32, "rank": 4, "gc": "on", "steps": 3, "warmup": 1}
    return Setting.model_validate({**base, "device": "cuda", **more})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Document]:
    """A document of the stand-in's answers; what came in which order is in `order`."""

    def go(plan: Plan, setting: Setting | None = None, **more: Any) -> Document:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        (tmp_path / "order").write_text("")
        monkeypatch.setenv("PLAN", str(tmp_path / "plan.json"))
        monkeypatch.setenv("ORDER", str(tmp_path / "order"))
        monkeypatch.setattr(run, "COMMAND", [sys.executable, "-S", str(FAKE)])
        return Bench([setting or tiny()], **{"rounds": 2, **more}).run()

    return go


def by_name(d: Document) -> dict[str, EngineSteps]:
    return {e.name: e for e in d.models[0].engines}


def shown(d: Document) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(views.table(d))
    return console.export_text()


def test_the_whole_road_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
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


def test_engines_take_turns_and_each_round_begins_with_another(
    measured: Callable[..., Document], tmp_path: Path
) -> None:
    d = measured({"hf": {"ms": 20.0}, "liger": {"ms": 16.0}, "unsloth": {"ms": 15.0}, "sparktune": {"ms": 10.0}})
    order = (tmp_path / "order").read_text().split()
    assert order == ["prepare", "calibrate", *NAMES, *NAMES[1:], "hf"]
    e, m = by_name(d), d.models[0]
    assert all(x.status == "timed" and [r.number for r in x.rounds] == [1, 2] for x in e.values())
    assert e["sparktune"].speedup and e["sparktune"].speedup.value == pytest.approx(2.0)
    assert e["sparktune"].tokens_per_s and e["sparktune"].tokens_per_s.value == pytest.approx(64 / 10.01e-3)
    assert e["sparktune"].light == pytest.approx(5.0 / 10.01)
    assert e["sparktune"].useful_tflop_s == pytest.approx(m.useful_tflop / 10.01e-3)
    assert e["hf"].memory.peak_allocated_gib == 71.0 and e["hf"].first_step_s == 2.0
    assert (m.best_other, m.verdict) == ("unsloth", "faster") and m.sentence.startswith("1.50 x faster than Unsloth")
    assert d.trusted and not d.partial and bench_train.exit_code(d) == 0
    assert d.engines[2].version == "9"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"loss": 12.021}, "loss of step 0 is 0.021"),
        ({"norm": 0.979}, "gradient norm of step 0 is 2.1%"),
        ({"loss": None}, "not finite"),
    ],
)
def test_a_wrong_engine_is_shown_and_not_ranked(measured: Callable[..., Document], plan: Any, said: str) -> None:
    d = measured({"hf": {"ms": 20.0}, "liger": {"ms": 2.0, **plan}, "sparktune": {"ms": 10.0}}, rounds=1)
    e = by_name(d)
    assert e["liger"].status == "wrong" and said in e["liger"].reason and e["liger"].step_ms
    assert d.models[0].best_other == "unsloth" and bench_train.exit_code(d) == 0
    assert any(said in p for p in views.problems(d)) and "wrong" in shown(d)
    fine = measured({"liger": {"loss": 12.019, "norm": 1.019}}, rounds=1)
    assert by_name(fine)["liger"].status == "timed"


def test_sparktune_that_is_wrong_has_no_verdict_and_exit_1(measured: Callable[..., Document]) -> None:
    d = measured({"sparktune": {"ms": 1.0, "loss": 13.0}}, rounds=1)
    assert d.models[0].verdict == "" and "sparktune is wrong" in d.models[0].error
    assert bench_train.exit_code(d) == 1 and "sparktune is wrong" in views.tally(d)


def test_missing_and_failed_engines_say_why_and_are_not_tried_again(
    measured: Callable[..., Document], tmp_path: Path
) -> None:
    d = measured(
        {"liger": {"missing": "no package liger_kernel"}, "unsloth": {"raise": "no such kernel", "from_round": 2}},
        rounds=3,
    )
    e = by_name(d)
    assert e["liger"].status == "missing" and d.engines[1].missing == "no package liger_kernel"
    assert (e["unsloth"].status, e["unsloth"].failed_round, len(e["unsloth"].rounds)) == ("failed", 2, 1)
    order = (tmp_path / "order").read_text().split()
    assert order.count("liger") == 1 and order.count("unsloth") == 2 and order.count("hf") == 3
    said = "\n".join(views.problems(d))
    assert "no package liger_kernel" in said and "failed in round 2: RuntimeError: no such kernel" in said
    assert d.models[0].best_other == "hf" and bench_train.exit_code(d) == 0


def test_without_hf_nothing_is_ranked(measured: Callable[..., Document]) -> None:
    d = measured({"hf": {"raise": "out of memory"}}, rounds=1)
    assert {x.status for x in d.models[0].engines} == {"failed", "unchecked"}
    assert "hf is failed: RuntimeError: out of memory" in d.models[0].error and bench_train.exit_code(d) == 1


def test_a_clock_that_moved_leaves_no_verdict(measured: Callable[..., Document]) -> None:
    d = measured({"sparktune": {"ms": 5.0, "copy": 94.0}})
    assert not d.trusted and d.canary and d.canary.drift == pytest.approx(-0.06)
    assert "no verdict stands" in views.tally(d) and "faster" not in views.tally(d) and bench_train.exit_code(d) == 3
    silent = measured({n: {"copy": None} for n in NAMES})
    assert silent.canary is None and bench_train.exit_code(silent) == 3 and "no verdict stands" in views.tally(silent)


def test_a_budget_starts_no_process_after_its_end(measured: Callable[..., Document], tmp_path: Path) -> None:
    ticks = iter(range(10**6))  # the start, then a look a process
    d = measured({}, rounds=5, budget=7.5, clock=lambda: float(next(ticks)))
    assert (tmp_path / "order").read_text().split() == ["prepare", "calibrate", *NAMES, "liger"]
    assert d.partial == "the budget of 8 s was used up" and not d.interrupted and views.tally(d).startswith("Partial: ")
    assert "tiny, liger: 2 of 5 rounds: the budget of 8 s was used up" in views.problems(d)
    assert d.models[0].verdict == "no difference" and bench_train.exit_code(d) == 0
    ticks = iter(range(10**6))
    nothing = measured({}, budget=0.5, clock=lambda: float(next(ticks)))
    assert {e.status for e in nothing.models[0].engines} == {"not reached"} and bench_train.exit_code(nothing) == 1


def test_an_interruption_keeps_what_was_measured(measured: Callable[..., Document]) -> None:
    def progress(line: str) -> None:
        if "round 2" in line and "hf" in line:
            raise KeyboardInterrupt

    d = measured({"sparktune": {"ms": 5.0}}, progress=progress)
    counts = {e.name: len(e.rounds) for e in d.models[0].engines}
    assert counts == {"hf": 1, "liger": 2, "unsloth": 2, "sparktune": 2}
    assert (
        d.interrupted and bench_train.exit_code(d) == 130 and views.tally(d).startswith("Partial: it was interrupted.")
    )
    assert d.models[0].verdict == "faster"
    assert any(p.endswith("1 of 2 rounds: it was interrupted") for p in views.problems(d))


def test_a_checkpoint_that_can_not_be_written_ends_its_model_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "COMMAND", [sys.executable, "-c", "import sys; print('no room left'); sys.exit(9)"])
    d = Bench([tiny()], rounds=1).run()
    assert "checkpoint could not be written: its process died: exit code 9" in d.models[0].error
    assert bench_train.exit_code(d) == 1


def test_views_tell_the_same_story_within_80_columns(measured: Callable[..., Document], tmp_path: Path) -> None:
    notes = {"watermarks": {"rms_norm": {"triton": 7, "reference": 0}}, "fallbacks": {"layer 1: a bias": 3}}
    d = measured(
        {
            "hf": {"ms": 123456.7},
            "sparktune": {"ms": 98765.4, "notes": notes},
            "liger": {"ms": 10000.0},
            "unsloth": {"missing": "not here"},
        }
    )
    jsonschema.Draft202012Validator(json.loads(train_schema())).validate(json.loads(d.model_dump_json()))
    assert Document.model_validate_json(d.model_dump_json()) == d
    text, page, table = views.markdown(d), views.html(d), shown(d)
    assert all(len(line) <= 80 for line in table.splitlines()) and "…" not in table
    assert "12.3 (12.3–12.4)" in table and "71.0/75.3" in table
    assert "98864.2" in table and "1.25 (1.25–1.25)" in table and "missing" in table
    for view in (text, page):
        assert views.tally(d) in view.replace("&#39;", "'") and "98864.2" in view and "not here" in view
    assert "by triton: rms_norm. Module by module: layer 1: a bias (3 calls)" in text
    assert "pinned host memory: hf 0.50" in text
    assert page.count("<figure>") == 2 and "<script" not in page and "sparkproof bench train" in page


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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--engine ligr", "no engine 'ligr'"),
        ("--model llama", "no model 'llama'"),
        ("--device tpu --model tiny", "no device 'tpu'"),
        ("--device cpu", "hours on a CPU"),
        ("--layers 33", "--layers must be 0 to 32"),
        ("--batch 0", "--batch must be 1 or more"),
        ("--warmup 0", "--warmup must be 1"),
        ("--rounds 0", "--rounds must be 1"),
        ("--packed 300", "fewer than 16 tokens"),
        ("--budget 0", "--budget"),
        ("--gc maybe", "no choice for --gc 'maybe'"),
        ("--memory-budget -1", "--memory-budget must be GiB"),
        ("--memory-budget nan", "--memory-budget must be GiB"),
        ("--memory-budget inf --gc off", "does nothing with --gc off"),
        ("--site unsloth", "ENGINE=DIR"),
        ("--site unsloth=/no/such/folder", "no folder /no/such/folder"),
        ("--engine hf --site unsloth=/", "no engine 'unsloth'"),
        ("--model tiny", "torch sees none"),
    ],
)
def test_what_is_not_supported_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["sparkproof", "bench", "train", *line.split()])
    with pytest.raises(SystemExit) as e:
        main()
    error = capsys.readouterr().err
    assert e.value.code == 2 and said in error and "Traceback" not in error and error.count("error:") == 1


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Recorded(Bench):
        def run(self) -> Document:
            seen.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "Bench", Recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = "--model qwen3-8b --model llama32-1b --layers 0 --batch 4 --seq 64 --rank 8 --steps 5 --warmup 2 --rounds 1 --gc on"
    line += f" --memory-budget inf --engine liger --site liger={tmp_path} --budget 60"
    CliRunner().invoke(app, ["bench", "train", *line.split()])
    (b,) = seen
    assert [(s.model, s.layers) for s in b.settings] == [("qwen3-8b", 36), ("llama32-1b", 16)]
    s = b.settings[0]
    assert (s.batch, s.seq, s.rank, s.steps, s.warmup, s.memory_budget_gib) == (4, 64, 8, 5, 2, "inf")
    assert b.names == ["hf", "liger", "sparktune"] and b.sites == {"liger": [str(tmp_path)]}
    assert b.rounds == 1 and b.budget == 60 and float(str(s.memory_budget_gib)) == math.inf


def test_a_verdict_needs_an_interval_beside_one(measured: Callable[..., Document]) -> None:
    same = measured({n: {"ms": 10.0} for n in NAMES})
    assert same.models[0].verdict == "no difference" and "no difference" in views.tally(same)
    slow = measured({"sparktune": {"ms": 12.0}})
    assert slow.models[0].verdict == "slower" and bench_train.exit_code(slow) == 0


def test_every_field_is_described() -> None:
    schema = json.loads(train_schema())
    for name, definition in [("Document", schema), *schema["$defs"].items()]:
        for key, field in definition["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"


def test_floors_of_unreached_models_stay_empty() -> None:
    m = ModelSteps(
        setting=tiny(),
        optimizer="none",
        useful_tflop=1.0,
        engines=[EngineSteps(name=n, status="not reached") for n in NAMES],
    )
    compare.finish(m)
    assert m.verdict == "" and m.error == "" and m.against_best is None
