"""`sparkproof bench ops` without a GPU: its rows, its guard on tiny shapes, its budget, its views, and its refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from sparkproof.bench import cases, engines, guard, intervals, ops, shapes, views, warm
from sparkproof.bench.document import Canary, Document, EngineInfo, EngineTime, Interval, PassTimes, bench_schema
from sparkproof.bench.engines import hf, sparktune
from sparkproof.bench.shapes import Model, Row
from sparkproof.cli import app, main
from sparkproof.errors import UserError
from sparkproof.judge import stats
from typer.testing import CliRunner

CPU = torch.device("cpu")
TINY = {
    "name": "Tiny",
    "hidden": 64,
    "intermediate": 128,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 32,
    "vocab": 96,
}
LLAMA = Model(**TINY, eps=1e-5, qk_norm=True, source="made up")
GEMMA = Model(**TINY, eps=1e-6, norm="gemma", activation="gelu_tanh", qk_norm=True, source="made up")


def row(op: str, model: Model = LLAMA, tokens: int = 24) -> Row:
    kind = next(k for k in shapes.shapes().case if k.op == op)
    return Row(kind, model, 0 if kind.once else tokens)


def every_row() -> list[Row]:
    found = []
    for model in (LLAMA, GEMMA):
        for kind in shapes.shapes().case:
            if kind.suits(model):
                found.append(Row(kind, model, 0 if kind.once else 24))
    return found


class FakeTimer:
    method, reason, call_us = "graph", "", 12.0

    def __init__(self, ms: float) -> None:
        self.ms, self.freed, self.taken = ms, False, 0

    def sample(self) -> float:
        self.taken += 1
        return self.ms * (1 + 0.001 * self.taken)

    def free(self) -> None:
        self.freed = True


class FakeClock:
    """Times in the order that timers are asked for: the yardstick's, then the engines'."""

    def __init__(self, *ms: float) -> None:
        self.ms, self.timers = list(ms) or [1.0], []

    def timer(self, run: Callable[[int], Any], sets: int, why_not: str = "") -> FakeTimer:
        for i in range(sets):
            run(i)
        self.timers.append(FakeTimer(self.ms[len(self.timers) % len(self.ms)]))
        return self.timers[-1]

    def copy(self, size: int) -> dict[str, tuple[Callable[[int], Any], int]]:
        return {n: (lambda i: None, 1) for n in ("copy by the driver", "copy by a kernel")}

    def sets(self, touched: int) -> int:
        return 2


def bench(clock: FakeClock, names: tuple[str, ...] = ("sparktune", "hf"), **more: Any) -> ops.Bench:
    return ops.Bench(clock, CPU, names, **more)


def document(rows: list[Any], names: tuple[str, ...] = ("sparktune", "hf"), **more: Any) -> Document:
    infos = [EngineInfo(name=n, words=engines.WORDS[n], version="1") for n in names]
    drift = more.pop("drift", 0.0)
    return Document(
        device="Imaginary GPU", multiprocessors=4, l2_bytes=1, software={"torch": "2"}, engines=infos, rows=rows,
        canary=Canary(before=[1.0], after=[1.0 + drift], drift=drift, band=0.05), trusted=abs(drift) <= 0.05,
        copy_gb_s=Interval(value=100.0, low=99.0, high=101.0), **more,
    )  # fmt: skip


def test_the_table_covers_four_models_and_every_op_of_theirs() -> None:
    found = shapes.rows([], [], [])
    assert len({r.model.name for r in found}) == 4
    assert {r.kind.op for r in found} == set(cases._CASES)
    assert {r.tokens for r in found} == {0, 1024, 4096, 16384}
    assert all(r.kind.op == "geglu" for r in found if "glu" in r.kind.op and r.model.name.startswith("Gemma"))
    assert {r.model.name for r in found if r.kind.op == "qk_norm_rope"} == {"Qwen3-8B", "Gemma-3-4B"}
    assert all(m.source.startswith("https://") for m in shapes.shapes().models.values())


def test_options_choose_rows_and_a_misspelt_one_is_told_the_nearest() -> None:
    (one,) = shapes.rows(["rope"], ["Qwen3-8B"], [2048])
    assert one.title == "rope, Qwen3-8B, 2048 tokens"
    quick = shapes.rows([], [], [], quick=True)
    assert {r.model.name for r in quick} == {"Llama-3.1-8B"} and {r.tokens for r in quick} == {0, 4096}
    for arguments in ((["rop"], [], []), ([], ["lama"], []), ([], [], [0]), (["geglu"], ["llama"], [])):
        with pytest.raises(UserError):
            shapes.rows(*arguments)


def test_every_adapter_has_an_op_of_the_table_and_every_gap_a_reason() -> None:
    for name in engines.NAMES:
        file = engines.load(name)
        for op in shapes.ops():
            assert (op in file.BUILDERS) != (op in file.MISSING), (name, op)


def test_lora_tensors_are_those_of_a_whole_model() -> None:
    llama = shapes.shapes().models["llama"]
    assert len(cases.lora_tensors(llama)) == 448
    assert sum(a * b for a, b in cases.lora_tensors(llama)) == 41_943_040


@pytest.mark.parametrize("r", every_row(), ids=lambda r: f"{r.model.norm}-{r.kind.op}-{r.kind.part}".rstrip("-"))
def test_ours_agrees_with_transformers_peft_and_bitsandbytes(r: Row) -> None:
    if r.kind.op == "adamw8bit":
        pytest.skip("bitsandbytes steps 8-bit states on a GPU alone")
    pytest.importorskip("bitsandbytes")
    case = cases.build(r, CPU)
    inputs = case.make(0)
    reference = guard.run(case, case.reference or hf.BUILDERS[r.kind.op](case), inputs)
    try:
        call = sparktune.BUILDERS[r.kind.op](case)
    except ModuleNotFoundError:
        pytest.skip("the op is not there yet")
    forward, backward = guard.check(guard.run(case, call, inputs), reference)
    assert forward < guard.BOUND and (backward is None or backward < guard.BOUND)
    guard.check(guard.run(case, hf.BUILDERS[r.kind.op](case), inputs), reference)


def test_hf_runs_peft_layers_over_nested_nf4() -> None:
    pytest.importorskip("bitsandbytes")
    from peft.tuners.lora.bnb import Linear4bit

    module = cases.build(row("lora_qkv"), CPU).shared["module"]
    assert isinstance(module.q_proj, Linear4bit)
    base, (a, b), scale = module.lora("k")
    assert base.weight.quant_state.nested and base.weight.quant_state.quant_type == "nf4"
    assert a.dtype == b.dtype == torch.float32 and scale == 1.0 and b.abs().sum() > 0


def test_the_guard_refuses_wrong_outputs_and_wrong_gradients() -> None:
    case = cases.build(row("swiglu"), CPU)
    inputs = case.make(0)
    right = guard.run(case, hf.BUILDERS["swiglu"](case), inputs)
    off = guard.run(case, lambda t: (torch.relu(t["gate"]) * t["up"],), inputs)
    with pytest.raises(guard.WrongResult, match="output"):
        guard.check(off, right)

    def forward_only(t: dict[str, Any]) -> tuple[torch.Tensor]:
        y = torch.nn.functional.silu(t["gate"]) * t["up"]
        return (y.detach() + 0 * t["gate"],)

    with pytest.raises(guard.WrongResult, match="gradient"):
        guard.check(guard.run(case, forward_only, inputs), right)
    with pytest.raises(guard.WrongResult, match="outputs"):
        guard.check(guard.Right((), None), right)
    nan = guard.Right((right.outputs[0] * float("nan"),), right.gradient)
    assert guard.finite(right) and not guard.finite(nan)
    assert not guard.finite(guard.Right(right.outputs, torch.tensor([float("inf")])))
    with pytest.raises(guard.WrongResult, match="inf"):
        guard.check(nan, right)


def test_a_call_that_writes_over_its_inputs_spoils_nobody_elses() -> None:
    case = cases.build(row("swiglu"), CPU)
    inputs = case.make(0)
    before = inputs["gate"].detach().clone()

    def call(t: dict[str, Any]) -> tuple[torch.Tensor]:
        y = t["gate"] * t["up"]
        t["gate"].data.zero_()
        return (y,)

    run, _ = ops._run(case, "forward", call, [inputs], writes=True)
    run(0)
    guard.run(case, lambda t: (t["gate"] * t["up"], t["up"].data.zero_())[:1], inputs)
    assert torch.equal(inputs["gate"], before) and inputs["up"].abs().sum() > 0


def test_a_row_is_measured_in_turn_with_a_copy_of_its_bytes() -> None:
    clock = FakeClock(0.5, 1.0, 1.0, 2.0)  # two copies, sparktune, hf
    rows, left_out = bench(clock).rows([row("rms_norm")], [100.0, 101.0])
    assert not left_out and not rows[0].error
    forward, backward = rows[0].passes
    assert [forward.which, backward.which] == ["forward", "backward"]
    assert forward.bytes == 2 * 2 * 24 * 64 and backward.bytes == 3 * 2 * 24 * 64
    assert forward.yardstick == "copy by the driver"
    ours, theirs = forward.engines
    assert ours.fraction and ours.fraction.value == pytest.approx(0.5, rel=0.01)
    assert theirs.fraction and theirs.fraction.value == pytest.approx(0.25, rel=0.01)
    assert (forward.best_peer, forward.verdict) == ("hf", "faster")
    assert forward.sentence.startswith("2.00 x faster than transformers")
    assert ours.call_us == 12.0 and len(ours.samples) == ops.SAMPLES
    assert all(t.freed for t in clock.timers)


def test_an_interval_that_spans_one_is_no_difference() -> None:
    def one(name: str, samples: list[float]) -> EngineTime:
        return EngineTime(name=name, status="timed", samples=samples)

    p = PassTimes(which="forward", bytes=1, flops=0, yardstick="copy", engines=[])
    p.engines = [one("sparktune", [1.0, 1.1, 0.9]), one("hf", [1.05, 0.95, 1.0]), one("liger", [3.0, 3.0, 3.0])]
    ops.judge(p)
    assert (p.verdict, p.best_peer) == ("no difference", "hf")
    p.engines[1].samples = [0.5, 0.5, 0.51]
    ops.judge(p)
    assert p.verdict == "slower"


def test_matrix_bound_rows_are_held_to_the_bare_product() -> None:
    pytest.importorskip("bitsandbytes")
    rows, _ = bench(FakeClock(1.0, 1.25, 2.0)).rows([row("lora_qkv")], [100.0])
    assert not rows[0].error, rows[0].error
    p = rows[0].passes[0]
    assert p.yardstick == "bare GEMM" and p.flops == 2 * 24 * 128 * 64 and p.bytes == 0
    assert p.engines[0].fraction and p.engines[0].fraction.value == pytest.approx(0.8, rel=0.01)
    assert p.engines[0].big_copy_fraction is None


def test_missing_broken_and_wrong_engines_keep_their_place_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: cases.Case) -> cases.Call:
        raise ImportError("no such kernel")

    monkeypatch.setitem(engines.load("liger").BUILDERS, "swiglu", broken)
    monkeypatch.setitem(engines.load("unsloth").BUILDERS, "swiglu", lambda case: lambda t: (t["gate"],))
    monkeypatch.setattr(engines, "refusal", lambda name: "not here today" if name == "compiled" else "")
    rows, _ = bench(FakeClock(), names=engines.NAMES).rows([row("swiglu")], [100.0])
    by_name = {e.name: e for e in rows[0].passes[0].engines}
    assert by_name["compiled"].status == "missing" and by_name["compiled"].reason == "not here today"
    assert by_name["liger"].status == "failed" and "no such kernel" in by_name["liger"].reason
    assert by_name["unsloth"].status == "wrong" and "from the reference" in by_name["unsloth"].reason
    assert by_name["sparktune"].status == by_name["hf"].status == "timed"
    said = "\n".join(views.problems(document(rows, engines.NAMES)))
    assert "no such kernel" in said and "not here today" in said and "from the reference" in said


def test_engines_that_do_not_fit_together_are_timed_one_by_one() -> None:
    class Crowded(FakeClock):
        def timer(self, run: Callable[[int], Any], sets: int, why_not: str = "") -> FakeTimer:
            if sum(not t.freed for t in self.timers) >= 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().timer(run, sets, why_not)

    rows, _ = bench(Crowded()).rows([row("rms_norm")], [100.0])
    ours = rows[0].passes[0].engines[0]
    assert ours.status == "timed" and "apart from the others" in ours.note


def test_what_cannot_be_captured_is_not_tried_again_with_the_next_size() -> None:
    asked: list[str] = []

    class Refusing(FakeClock):
        def timer(self, run: Callable[[int], Any], sets: int, why_not: str = "") -> FakeTimer:
            timer = super().timer(run, sets, why_not)
            asked.append(why_not)
            if len(asked) == 4:  # hf's, after both ways of copying and ours
                timer.method, timer.reason = "events", "not captured: AcceleratorError: it waited"
            return timer

    wanted = [row("rms_norm", tokens=t) for t in (24, 32)]
    rows, _ = bench(Refusing()).rows(wanted, [100.0])
    first, second = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    assert set(first) == {""} and second.count("not captured: AcceleratorError: it waited") == 1
    assert rows[0].passes[0].engines[1].method == "events"


def test_a_budget_ends_between_rows_and_names_what_it_left() -> None:
    class Slow(FakeClock):
        def timer(self, run: Callable[[int], Any], sets: int, why_not: str = "") -> FakeTimer:
            time.sleep(0.05)
            return super().timer(run, sets, why_not)

    wanted = [row("swiglu", tokens=t) for t in range(1, 30)]
    rows, left_out = bench(Slow(), budget=1.0).rows(wanted, [100.0])
    assert 0 < len(rows) < 29 and len(rows) + len(left_out) == 29
    assert left_out[0].row == wanted[len(rows)].title and "budget of 1 s" in left_out[0].reason
    assert any("not reached" in p for p in views.problems(document(rows, left_out=left_out)))


def test_views_tell_the_same_story(tmp_path: Path) -> None:
    rows, _ = bench(FakeClock(0.5, 1.0, 1.0, 2.0)).rows([row("rms_norm"), row("rms_norm", GEMMA)], [100.0, 101.0])
    d = document(rows)
    jsonschema.Draft202012Validator(json.loads(bench_schema())).validate(json.loads(d.model_dump_json()))
    assert Document.model_validate_json(d.model_dump_json()) == d
    text, page = views.markdown(d), views.html(d)
    assert "| rms_norm | Tiny | 24 | forward | 1003.0 | 50 | 25 | faster, 2.00 x hf |" in text
    assert views.tally(d) == "Against the best other engine of each row, of 4: faster 4, no difference 0, slower 0."
    assert views.tally(d) in text and views.tally(d) in page
    assert page.count("<figure>") == 2 and "<script" not in page and "http-equiv" in page
    assert "the best other engine" in page
    from sparkproof.cli import bench as cli

    cli.write(d, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["bench.html", "bench.json", "bench.md"]


def test_a_clock_that_moved_leaves_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console
    from sparkproof.cli import bench as cli

    rows, _ = bench(FakeClock(0.5, 1.0, 1.0, 2.0)).rows([row("rms_norm")], [100.0])
    cli.show(document(rows, drift=0.2), Console())
    out = capsys.readouterr().out
    assert "no verdict stands" in out and "retest" in out and "faster" not in out


def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, d: Document, *arguments: str) -> Any:
    monkeypatch.setenv("SPARKPROOF_LOCK_DIR", str(tmp_path))
    monkeypatch.setattr(ops, "need_gpu", lambda: CPU)
    monkeypatch.setattr(ops, "measure", lambda *a, **k: d)
    return CliRunner().invoke(app, ["bench", "ops", *arguments])


@pytest.mark.parametrize(("drift", "code"), [(0.0, 0), (-0.06, 3)])
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drift: float, code: int) -> None:
    rows, _ = bench(FakeClock()).rows([row("rms_norm")], [100.0])
    found = command(monkeypatch, tmp_path, document(rows, drift=drift), "--json")
    assert found.exit_code == code
    assert json.loads(found.stdout)["schema_version"] == 1
    rows[0].error = "OutOfMemoryError"
    assert command(monkeypatch, tmp_path, document(rows), "--json").exit_code == 1


def test_without_a_gpu_it_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for line, wanted in (
        (["ops"], "torch sees none"),
        (["ops", "--engine", "ligr"], "no engine 'ligr'"),
        (["ops", "--budget", "0"], "--budget"),
    ):
        monkeypatch.setattr("sys.argv", ["sparkproof", "bench", *line])
        with pytest.raises(SystemExit) as e:
            main()
        said = capsys.readouterr().err
        assert e.value.code == 2 and wanted in said and "Traceback" not in said and said.count("error:") == 1


def test_what_an_import_replaced_is_put_back() -> None:
    pytest.importorskip("bitsandbytes")
    from transformers.models.llama import modeling_llama

    hf.capture()
    right = modeling_llama.LlamaRMSNorm.forward
    modeling_llama.LlamaRMSNorm.forward = lambda self, x: x
    try:
        assert hf.restore() == ["transformers.models.llama.modeling_llama.LlamaRMSNorm.forward"]
        assert modeling_llama.LlamaRMSNorm.forward is right and hf.restore() == []
    finally:
        modeling_llama.LlamaRMSNorm.forward = right


@pytest.mark.parametrize("n", [1, 3, 5, 25])
def test_counted_intervals_are_the_drawn_ones(n: int) -> None:
    over = [1 + 0.01 * ((37 * i) % 29) for i in range(n)]
    under = [2 + 0.02 * ((17 * i) % 23) for i in range(5)]
    assert sum(intervals.weights(n)) == pytest.approx(1)
    for counted, drawn in (
        (intervals.median(over), stats.median(over)),
        (intervals.ratio(over, under), stats.ratio(over, under)),
    ):
        assert counted.value == drawn.value
        assert counted.low == pytest.approx(drawn.low, abs=0.011) and counted.high == pytest.approx(
            drawn.high, abs=0.011
        )
    assert intervals.median([1.0, 2.0]) == stats.median([1.0, 2.0])


def test_workers_share_all_rows_and_one_has_the_large_ones() -> None:
    rows = shapes.rows([], [], [])
    found = warm.shares(rows, 12)
    assert len(found) == 12 and sum(len(s) for s in found) == len(rows)
    assert [{r.kind.op in warm.LARGE for r in s} for s in found[:-1]] == [{False}] * 11
    assert {r.kind.op for r in found[-1]} == set(warm.LARGE)
