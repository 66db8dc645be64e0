"""Engines side by side: turns over stand-ins for their processes, ratios, verdicts, and what the report says of them."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import report_sample as sample
import torch
from pydantic import ValidationError
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.judge.comparison import Side, speed
from sparkproof.judge.stats import Interval
from sparkproof.report import engines, html, summary
from sparkproof.report.closing import closing
from sparkproof.results import CaseResult, ReasonClass, Verdict
from sparkproof.runners import comparison
from sparkproof.runners.base import Context
from sparkproof.runners.process import Outcome
from sparkproof.scenario import Case, ComparisonScenario

RAN = {
    "hf": {"mode": "host", "patches": {}, "watermarks": {}},
    "sparktune": {
        "mode": "reference", "patches": {"patched": {"rms_norm": 2}, "fallbacks": {}},
        "watermarks": {"rms_norm": {"triton": 0, "interpreter": 0, "reference": 9}},
    },
}  # fmt: skip
HAS_GPU = torch.cuda.is_available()
MS = {"hf": 20.0, "sparktune": 10.0}


def case(**more: Any) -> Case:
    body = {
        "kind": "comparison",
        "summary": "stand-ins of engines",
        "shape": "tiny",
        "rounds": 3,
        "steps": 2,
        "more_rounds_s": 0,
        **more,
    }
    return Case(name="comparison/tiny", file="c.yaml", scenario=ComparisonScenario.model_validate(body))


class Stage(Context):
    """A context whose engines are stand-ins that keep to the protocol of turns; `acts` says how one ends otherwise."""

    acts: dict[str, Any]
    order: list[str]
    alone: int
    on_gpu = False

    def spawn(self, entry, payload, *, case, phase, timeout_s, env=None):  # type: ignore[no-untyped-def]
        what = entry.partition(":")[2]
        self.order.append(phase)
        if what == "prepare":
            Path(payload["folder"]).mkdir()
            return Outcome(status="ok", result={"bytes": 1})
        if what == "canaries":
            return Outcome(status="ok", result=dict(sample.CANARIES))
        act = self.acts.get(phase)
        if isinstance(act, Outcome):
            return act
        turns, blocks = Path(payload["turns"]), []
        first = {"loss": 7.0, "norm": 1.0, "load_s": 1.0, "first_step_s": 0.5, **(act or {})}
        (turns / f"{phase}-0.json").write_text(json.dumps(first))
        with open(turns / f"{phase}.fifo") as fifo:
            for line in fifo:
                if line.strip() == "end":
                    break
                self.alone += 1
                assert self.alone == 1, "two engines ran at once"
                self.order.append(f"{phase} {line.strip()}")
                time.sleep(0.02)
                if act and act.get("dies") == int(line):
                    self.alone -= 1
                    return Outcome(status="memory", min_available_gib=3.9, peak_rss_gib=9.0)
                n = len(blocks)
                blocks.append({"ms": [MS[phase] + 0.1 * n, MS[phase] - 0.05 * n], "during": {}})
                self.alone -= 1
                (turns / f"{phase}-{int(line)}.json").write_text("{}")
        result = {
            **first, "blocks": blocks, "memory": {"peak_rss_gib": 4.0 if phase == "hf" else 3.0}, "ran": RAN[phase],
            "work": {"flops": 1e9, "bytes": 1e6}, "versions": {}, "architecture": "llama",
        }  # fmt: skip
        return Outcome(status="ok", result=result, start_available_gib=20.0, min_available_gib=15.0)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    context = Stage(tmp_path, sample.laptop(), tmp_path / "cache", 0.5)
    context.acts, context.order, context.alone = {}, [], 0
    missing = {
        "message": "Unsloth is not installed, so nothing was trained with it.",
        "fix": "x",
        "skip_class": "no-engine",
    }
    for name in ("unsloth", "liger"):
        context.acts[name] = Outcome(status="ok", result={"user_error": missing})
    return context


def rows(result: CaseResult) -> dict[str, Any]:
    return {r["engine"]: r for r in result.evidence["engines"]}


def test_further_rounds_are_run_while_they_are_cheap_but_no_more_than_four_times_as_many(stage: Stage) -> None:
    result = comparison.run(case(more_rounds_s=60), stage)
    assert result.verdict is Verdict.PASSED, result.reason
    assert stage.order[-2:] == ["sparktune 12", "hf 12"]
    assert {m.conditions["rounds"] for m in result.measurements} == {12}
    stage.order.clear()
    comparison.run(case(more_rounds_s=0.1), stage)
    taken = max(int(x.split()[1]) for x in stage.order if x.startswith("hf "))
    assert 3 <= taken < 12


def test_engines_take_turns_block_by_block(stage: Stage) -> None:
    result = comparison.run(case(), stage)
    assert result.verdict is Verdict.PASSED, result.reason
    assert stage.order == [
        "prepare", "hf", "liger", "unsloth", "sparktune", "hf 1", "sparktune 1", "sparktune 2", "hf 2", "sparktune 3", "hf 3",
    ]  # fmt: skip
    ours = rows(result)["sparktune"]
    assert ours["ratio"] == pytest.approx(2.0, rel=0.02) and ours["ratio_low"] <= ours["ratio"] <= ours["ratio_high"]
    assert ours["memory_share"] == 0.75 and ours["machine_gib"] == 5.0
    assert ours["tokens_per_s"] == pytest.approx(2 * 2048 / 10.0e-3, rel=0.01)
    assert rows(result)["unsloth"]["status"] == "missing" and any("Without unsloth" in n for n in result.notices)
    assert result.mode == "host" and any("say nothing about a GPU" in n for n in result.notices)
    assert not list((stage.run_dir / "cases" / "comparison-tiny").glob("turns*")), "turns and checkpoint are removed"
    assert not (stage.run_dir / "cases" / "comparison-tiny" / "checkpoint").exists()


def test_an_engine_that_dies_in_its_turn_fails_and_the_others_go_on(stage: Stage) -> None:
    stage.acts["sparktune"] = {"dies": 2}
    result = comparison.run(case(), stage)
    assert result.verdict is Verdict.FAILED and "memory watchdog: 3.9 GiB were left" in result.reason
    assert rows(result)["sparktune"]["status"] == "failed" and "tokens_per_s" in rows(result)["hf"]
    assert stage.order.count("hf 3") == 1 and "sparktune 3" not in stage.order


def test_an_engine_that_computes_something_else_is_not_counted(stage: Stage) -> None:
    for act, said in (
        ({"loss": 7.03}, "first loss"),
        ({"norm": 1.05}, "first gradient norm"),
        ({"loss": None}, "finite"),
    ):
        stage.acts["sparktune"] = act
        result = comparison.run(case(), stage)
        assert result.verdict is Verdict.FAILED and said in result.reason
        row = rows(result)["sparktune"]
        assert row["status"] == "wrong" and "ratio" not in row and "tokens_per_s" in row


def test_what_hf_lacks_is_missing_to_all(stage: Stage) -> None:
    error = {"message": "The hub can't be reached.", "fix": "Connect.", "skip_class": "no-network"}
    stage.acts["hf"] = Outcome(status="ok", result={"user_error": error})
    with pytest.raises(UserError, match="can't be reached") as caught:
        comparison.run(case(), stage)
    assert caught.value.skip_class == "no-network"
    with pytest.raises(UserError, match="no train case 'train/nowhere'"):
        comparison.run(case(shape="", source="train/nowhere"), stage)
    stage.acts["hf"] = Outcome(status="error", error_type="KeyError", error="x")
    with pytest.raises(RuntimeError, match="process of hf"):
        comparison.run(case(), stage)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shape": ""}, "needs `source`"),
        ({"source": "train/x"}, "not both"),
        ({"shape": "", "source": "train/x", "layers": 2}, "goes with `shape`"),
        ({"engines": ["sparktune", "liger"]}, "needs hf"),
        ({"engines": ["hf"]}, "and another"),
        ({"engines": ["hf", "hf"]}, "each once"),
    ],
)
def test_a_comparison_that_compares_nothing_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        case(**fields)


def test_on_a_gpu_ratios_mfu_energy_and_kernels_are_judged() -> None:
    result = sample.comparison()
    assert result.verdict is Verdict.PASSED, result.reason
    found, named = rows(result), {a.name for a in result.assertions}
    assert found["sparktune"]["ratio"] == pytest.approx(1712 / 1188, rel=1e-3)
    assert found["hf"]["mfu"] == pytest.approx(4.2e13 / 1.712 / 61e12, rel=1e-3) and "ratio" not in found["hf"]
    assert found["hf"]["light"] == pytest.approx((4.2 / 6.1 + 3.6 / 186) / 1.712, rel=1e-3)
    assert found["hf"]["mj_a_token"] == pytest.approx(1e3 * 6 * 430 / (4096 * 18))
    assert {"Liger: launches of its kernels for norms", "kernels of other engines that hf launched"} <= named
    assert {"copy canary after, against before", "GEMV beside the copy", "clock under load"} <= named
    m = {x.name: x for x in result.measurements}
    assert (
        m["sparktune: times as fast as hf"].low
        and m["sparktune: tokens"].samples
        and not m["hf: step, median"].higher_is_better
    )
    assert all(
        x.conditions["canary_gemm_tflops"] == 61.0 and x.conditions["clock_mhz"] == 2410 for x in result.measurements
    )


def sides(**changes: Any) -> list[Side]:
    """The sample's sides, read back from its judge by planting into them."""
    kept: list[list[Side]] = []
    real = sample.judge

    def spy(case: Case, source: Any, found: list[Side], *more: Any) -> CaseResult:
        kept.append(copy.deepcopy(found))
        return real(case, source, found, *more)

    sample.judge = spy  # type: ignore[assignment]
    try:
        sample.comparison()
    finally:
        sample.judge = real
    for name, change in changes.items():
        change(next(s for s in kept[0] if s.name == name))
    return kept[0]


def test_an_engine_that_fell_back_on_a_gpu_is_failed_and_not_slower() -> None:
    def fall(side: Side) -> None:
        del side.seen["ran"]["watermarks"]["rms_norm"]

    result = sample.comparison(sides=sides(liger=fall))
    assert result.verdict is Verdict.FAILED and "Liger: launches of its kernels for norms" in result.reason
    assert rows(result)["liger"]["status"] == "failed" and "ratio" not in rows(result)["liger"]
    assert "fell back to plain PyTorch" in rows(result)["liger"]["why"]


def test_unsteady_canaries_are_a_retest_and_no_claim_is_made(tmp_path: Path) -> None:
    slow = {**sample.CANARIES, "gemv_gb_s": 180.0}
    result = sample.comparison(canaries={"before": sample.CANARIES, "after": slow})
    assert result.verdict is Verdict.RETEST and "GEMV canary moved from 231 to 180" in result.reason
    record = sample.record_of(tmp_path / "r", [result])
    (claim,) = engines.claims(record)
    assert "speeds can't be told" in claim and "times as fast" not in claim
    assert {row.cells[6] for row in engines.rows(record)} == {"retest", "missing"}


def test_the_claim_is_one_sentence_with_intervals_and_memory(tmp_path: Path) -> None:
    record = sample.record_of(tmp_path / "r", [*sample.good_results(), sample.comparison()])
    (claim,) = engines.claims(record)
    assert claim.startswith(
        "On this machine, at these settings (llama31-8b's shapes with random weights, 8 of 32 layers, NF4, "
    )
    assert "sparktune was 1.44 ± under 0.01 times as fast as hf with 0.54 of its memory" in claim
    assert "Liger was 1.01 ± under 0.01 times as fast as hf with 0.69 of its memory" in claim
    assert "Unsloth was not measured (Unsloth is not installed, so nothing was trained with it)" in claim
    assert claim.endswith(".") and "\n" not in claim
    page, text = html.render(record), summary.render(record)
    assert engines.QUESTION in page and "0.54 of its memory" in page and "0.54 of its memory" in text
    assert "\n".join(str(x) for x in closing(record, 160, lambda s: s)).count("0.54 of its memory") == 1
    ours = next(r for r in engines.rows(record) if r.cells[2] == "sparktune" and r.cells[0] == "llama")
    assert ours.cells[3] == "not tried" and ours.cells[4] == "3,448" and ours.cells[6].startswith("1.44 (")


def test_no_difference_is_said_where_the_interval_spans_one() -> None:
    assert speed(Interval(1.01, 0.98, 1.04)) == "showed no difference from hf in speed (1.01 times, 0.98 to 1.04)"
    assert speed(Interval(1.44, 1.41, 1.47)) == "was 1.44 ± 0.03 times as fast as hf"
    assert speed(Interval(0.8, 0.79, 0.82)).startswith("was 0.80 ± 0.0")


@pytest.mark.parametrize(
    ("results", "planned", "said"),
    [
        ([], (), "this run had no comparison of engines."),
        ([], ("comparison/x",), "the run ended before its comparison"),
        ("skipped", (), "needs a CUDA GPU that torch can use; there is none."),
        ("host", (), "there is no GPU, and the CPU's times say nothing"),
    ],
)
def test_what_was_not_measured_is_said_to_be_so(
    tmp_path: Path, results: Any, planned: tuple[str, ...], said: str
) -> None:
    if results == "skipped":
        why = "needs a CUDA GPU that torch can use; there is none"
        results = [
            sample.case(
                "comparison/x", "comparison", Verdict.SKIPPED, assertions=[], reason_class=ReasonClass.GPU, reason=why
            )
        ]
    elif results == "host":
        found = sample.comparison()
        found.mode = "host"
        results = [found]
    record = sample.record_of(tmp_path / "r", [sample.train("hf"), *results], planned_only=planned)
    (claim,) = engines.claims(record)
    assert claim.startswith("Whether Unsloth or sparktune is faster than hf was not measured: ") and said in claim


def test_learned_is_what_training_cases_of_that_family_showed(tmp_path: Path) -> None:
    def trained(engine: str, verdict: Verdict, mode: str = "gpu") -> CaseResult:
        result = sample.train(engine, mode=mode)
        return result.model_copy(update={"name": f"train/llama/1b[engine={engine}]", "verdict": verdict})

    for verdict, mode, word in (
        (Verdict.PASSED, "gpu", "yes"), (Verdict.RETEST, "gpu", "yes"), (Verdict.FAILED, "gpu", "no"),
        (Verdict.PASSED, "host", "yes, on the CPU"), (Verdict.BROKEN, "gpu", "no verdict"),
    ):  # fmt: skip
        results = [trained("hf", verdict, mode), sample.comparison()]
        record = sample.record_of(tmp_path / f"{verdict}{mode}", results)
        found = {r.cells[2]: r.cells[3] for r in engines.rows(record)}
        assert found["hf"] == word and found["sparktune"] == "not tried"
    small = sample.train("hf")  # a SmolLM2 is a Llama
    small.evidence["subject"] = {
        "family": "smollm2", "architecture": "llama", "model": "m", "engine": "hf", "batch": 2, "seq_len": 64,
    }  # fmt: skip
    record = sample.record_of(tmp_path / "small", [small, sample.comparison()])
    assert next((r.cells[0], r.cells[2], r.cells[3]) for r in engines.rows(record)) == ("llama", "hf", "yes")
    small.evidence["subject"]["architecture"] = "qwen3"
    record = sample.record_of(tmp_path / "other", [small, sample.comparison()])
    assert engines.rows(record)[0].cells[3] == "not tried"


def test_facts_decide_whether_canaries_are_timed(stage: Stage) -> None:
    stage.facts = sample.spark()
    comparison.run(case(), stage)
    assert stage.order.count("canaries") == 2
    stage.facts, stage.order = Facts.model_construct(gpus=[]), []
    comparison.run(case(), stage)
    assert "canaries" not in stage.order


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")]),
    ],
)
def test_in_real_processes(where: str, tmp_path: Path) -> None:
    """Two engines over one checkpoint, in processes of their own that take turns."""
    facts = sample.spark() if where == "gpu" else sample.laptop()
    context = Context(tmp_path, facts, tmp_path / "cache", 0.5)
    found = comparison.run(case(seq_len=64, warm_up=1, engines=["hf", "sparktune"], timeout_s=900), context)
    assert found.verdict in (Verdict.PASSED, Verdict.RETEST), (found.reason, found.output_tail)
    for row in rows(found).values():
        assert row["status"] == "timed" and row["tokens_per_s"] > 0 and row["peak_gib"] > 0
    assert rows(found)["sparktune"]["ratio_low"] <= rows(found)["sparktune"]["ratio_high"]
    assert found.mode == ("gpu" if where == "gpu" else "host")
    assert found.evidence["subject"]["architecture"] == "llama"
    assert "mfu" in rows(found)["hf"] or where == "cpu"
