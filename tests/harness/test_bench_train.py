"""`sparkproof bench train` without a GPU: its parent over a stand-in for its worker, its views, and its refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.console import Console
from sparkproof.bench.train import compare, run, views
from sparkproof.bench.train.document import Document, EngineSteps, ModelSteps, train_schema
from sparkproof.bench.train.run import Bench
from sparkproof.bench.train.setting import NAMES, Setting
from sparkproof.cli import app, bench_train, main
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
    assert "98864 " in table and "1.25 (1.25–1.25)" in table and "missing" in table
    for view in (text, page):
        assert views.tally(d) in view.replace("&#39;", "'") and "98864" in view and "not here" in view
    assert "by triton: rms_norm. Module by module: layer 1: a bias (3 calls)" in text
    assert "pinned host memory: hf 0.50" in text
    assert page.count("<figure>") == 2 and "<script" not in page and "sparkproof bench train" in page


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
        ("--offload --gc off", "--offload moves"),
        ("--offload --device cpu --model tiny", "--offload moves"),
        ("--offload-embedding --device cpu --model tiny", "--offload-embedding moves"),
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
    line += f" --offload --offload-embedding --memory-budget inf --engine liger --site liger={tmp_path} --budget 60"
    CliRunner().invoke(app, ["bench", "train", *line.split()])
    (b,) = seen
    assert [(s.model, s.layers) for s in b.settings] == [("qwen3-8b", 36), ("llama32-1b", 16)]
    s = b.settings[0]
    assert (s.batch, s.seq, s.rank, s.steps, s.warmup, s.memory_budget_gib) == (4, 64, 8, 5, 2, "inf")
    assert s.offload and s.offload_embedding
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
