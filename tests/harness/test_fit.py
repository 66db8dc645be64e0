"""The largest batch that fits: the search over made-up machines, its case, its command and its table."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import report_sample as sample
from sparkproof.cli import app
from sparkproof.errors import UserError
from sparkproof.measure.search import Forecast, Tried, search
from sparkproof.report import engines, html, summary
from sparkproof.results import CaseResult, Verdict
from sparkproof.runners import fit
from sparkproof.runners.base import Context
from sparkproof.runners.process import Outcome
from sparkproof.scenario import Case, FitScenario
from typer.testing import CliRunner


class Machine:
    """Peaks a + b n; a plan that is wrong by a factor; what was tried, and never more than there is."""

    def __init__(self, fixed: float, each: float, total: float, planned: float = 1.0, step_s: float = 0.1) -> None:
        self.fixed, self.each, self.total, self.planned, self.step_s = fixed, each, total, planned, step_s
        self.tried: list[int] = []

    def plan(self, n: int) -> float:
        return self.planned * (self.fixed + self.each * n)

    def measure(self, n: int) -> tuple[float, float]:
        self.tried.append(n)
        peak = self.fixed + self.each * n
        assert peak <= self.total, f"{n} rows run out of memory"
        return peak, self.step_s * n

    def search(self, limit: float, most: int = 10_000, most_s: float = 1e9) -> Any:
        return search(self.plan, self.measure, limit, most, most_s)


@pytest.mark.parametrize("planned", [0.5, 0.8, 1.0, 1.25, 2.0])
def test_nothing_runs_out_however_wrong_the_plan(planned: float) -> None:
    draw = random.Random(7)
    for _ in range(60):
        fixed, each = draw.uniform(0.5, 20), draw.uniform(0.01, 3)
        total = draw.uniform(1.2, 12) * (fixed + each)
        machine = Machine(fixed, each, total, planned)
        if machine.planned < 1 and machine.plan(1) * 1.03 <= total < fixed + each:
            continue  # one row alone does not fit, and the plan says that it does: no search can know
        found = machine.search(total)
        true = int((total - fixed) / each)
        assert found.batch == max(machine.tried, default=0) <= true
        assert found.batch >= min(1, true) or machine.plan(1) * 1.03 > total
        if found.batch:
            assert found.batch >= 0.85 * (total / 1.03 - fixed) / each - 1, "what fits with the spare is found"
        assert machine.tried == sorted(set(machine.tried)), "upward only"
        assert all(b <= 2 * a for a, b in zip(machine.tried, machine.tried[1:], strict=False)), "at most doubled"


def test_what_the_search_says() -> None:
    whole = Machine(4.0, 1.0, 100.0).search(20.0)
    assert (
        whole.batch == whole.predicted == 15 and whole.why == "16 rows would take 20.60 GiB by prediction, of 20.00 GiB"
    )
    none = Machine(30.0, 1.0, 100.0)
    found = none.search(20.0)
    assert (found.batch, found.predicted, none.tried) == (0, 0, []) and found.why.startswith(
        "1 rows would take 31.93 GiB"
    )
    few = Machine(1.0, 0.1, 100.0).search(20.0, most=4)
    assert few.batch == 4 and few.why == "no larger batch than 4 was asked for"
    slow = Machine(1.0, 0.1, 100.0, step_s=1.0).search(20.0, most_s=5.0)
    assert (slow.batch, slow.predicted) == (4, 184) and "a step of 8 rows would take about 8 s" in slow.why


def test_a_peak_that_jumps_is_found_out_and_ends_the_search() -> None:
    def measure(n: int) -> tuple[float, float]:
        return (10.0 + n if n < 8 else 40.0), 0.1

    found = search(lambda n: 10.0 + n, measure, 30.0, 100, 1e9)
    assert found.batch == 4 and found.tried[-1].batch == 8 and "40.00 GiB were measured at 8 rows" in found.why


def test_a_forecast_takes_the_worse_of_plan_and_line() -> None:
    forecast = Forecast(lambda n: 10.0)
    assert forecast.peak(5) == pytest.approx(10.3)
    forecast.tried = [Tried(1, 10.0, 12.0, 0.1), Tried(2, 10.0, 15.0, 0.1)]
    assert forecast.peak(4) == pytest.approx(21 * 1.03), "the line through both, 3 GiB a row"


def case(**more: Any) -> Case:
    body = {"kind": "fit", "summary": "what fits of a stand-in", "shape": "llama31-8b", "contexts": [512, 2048], **more}
    return Case(name="fit/shapes[shape=llama31-8b]", file="f.yaml", scenario=FitScenario.model_validate(body))


def row(context: int, batch: int, **more: Any) -> dict[str, Any]:
    tried = [{"batch": b, "planned": 5.0 + b, "measured": 5.5 + b, "seconds": 0.1 * b} for b in (1, batch)]
    return {
        "context": context, "batch": batch, "predicted": batch, "why": f"{batch + 1} rows would take 111 GiB by prediction",
        "planned_gib": 5.0 + batch, "peak_gib": 5.5 + batch, "tokens_per_s": 1400.0, "tried": tried, **more,
    }  # fmt: skip


MARKS = {"rms_norm": {"triton": 9, "interpreter": 0, "reference": 0}}
SEEN = {
    "limit_gib": 100.0, "loaded_gib": 5.4, "rows": [row(512, 80), row(2048, 20, predicted=22)], "ran_out": "",
    "ran": {"mode": "gpu", "patches": {"patched": {"rms_norm": 65}, "fallbacks": {}}, "watermarks": MARKS},
}  # fmt: skip


def judged(**more: Any) -> CaseResult:
    return fit.judge(case(), None, Outcome(status="ok", result={**SEEN, **more}))


def test_a_search_that_kept_to_its_limit_passes() -> None:
    result = judged()
    assert result.verdict is Verdict.PASSED and result.mode == "gpu" and result.notices == []
    m = {x.name: x for x in result.measurements}
    assert m["largest batch at 2048 tokens"].value == 20 and m["peak memory at 20 x 2048 tokens"].reference == 25.0
    assert result.evidence["subject"]["family"] == "llama" and len(result.evidence["tried"]) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ran_out": "8 rows of 512 tokens: CUDA out of memory"}, "nothing ran out of memory"),
        ({"rows": [row(512, 80)]}, "contexts searched: 1, allowed 2"),
        ({"rows": [row(512, 0, tried=[]), row(2048, 0, tried=[])]}, "largest batch at the shortest context: 0"),
        ({"rows": [row(512, 96), row(2048, 20)]}, "highest peak of all that was tried: 101.5 GiB, allowed <= 100.000"),
        ({"ran": {**SEEN["ran"], "watermarks": {"rms_norm": {"triton": 0, "reference": 3}}}}, "rms_norm: calls that ran"),
    ],
)  # fmt: skip
def test_each_way_in_which_a_search_is_wrong_fails(change: dict[str, Any], said: str) -> None:
    result = judged(**change)
    assert result.verdict is Verdict.FAILED and said in result.reason and result.next_step


def test_a_search_that_the_watchdog_ended_failed_and_one_of_the_harness_is_broken() -> None:
    killed = fit.judge(case(), None, Outcome(status="memory", min_available_gib=15.2, peak_rss_gib=90.0))
    assert killed.verdict is Verdict.FAILED and "memory watchdog" in killed.reason
    broken = fit.judge(case(), None, Outcome(status="error", error_type="KeyError", error="x"))
    assert broken.verdict is Verdict.BROKEN


def test_the_report_has_the_table(tmp_path: Path) -> None:
    record = sample.record_of(tmp_path / "r", [judged()])
    assert [r[3:7] for r in engines.fits(record)] == [
        ("512", "80", "85.5", "100"), ("2,048", "20 (22 predicted)", "25.5", "100"),
    ]  # fmt: skip
    for text in (html.render(record), summary.render(record)):
        assert "The largest batch that fits" in text and "20 (22 predicted)" in text


def test_the_phases_get_what_they_need_and_the_checkpoint_goes(tmp_path: Path) -> None:
    class Stage(Context):
        def spawn(self, entry, payload, *, case, phase, timeout_s, env=None):  # type: ignore[no-untyped-def]
            phases.append(phase)
            if phase == "prepare":
                Path(payload["folder"]).mkdir()
                return Outcome(status="ok", result={})
            assert payload["floor_gib"] == 16.0 and Path(payload["folder"]).is_dir()
            return Outcome(status="ok", result=answer)

    phases: list[str] = []
    answer: dict[str, Any] = SEEN
    stage = Stage(tmp_path, sample.spark(), tmp_path, 16.0)
    assert fit.run(case(), stage).verdict is Verdict.PASSED
    assert phases == ["prepare", "fit"] and not (tmp_path / "cases" / case().slug / "checkpoint").exists()
    answer = {"user_error": {"message": "Liger-Kernel is not installed.", "fix": "x", "skip_class": "no-engine"}}
    with pytest.raises(UserError, match="not installed"):
        fit.run(case(), stage)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama31-9b"], "'llama31-9b' is no shape and no train case."),
        (["tiny", "--engine", "unslot"], "Unknown engine 'unslot'."),
        (["tiny", "--context", "4"], "--context must be 16 or more, not 4."),
        (["train/llama/1b_qlora_single_device", "--layers", "2"], "--layers goes with a shape"),
    ],
)
def test_the_command_refuses_in_a_sentence(arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["fit", *arguments])
    assert isinstance(found.exception, UserError) and said in found.exception.message and found.exception.fix


@pytest.mark.slow
def test_the_whole_way_on_a_cpu() -> None:
    line = "fit tiny --context 64 --context 256 --limit-gib 1.1 --rank 4 --engine hf --json"
    found = CliRunner().invoke(app, line.split())
    assert found.exit_code == 0, (found.output, found.exception)
    (result,) = json.loads(found.stdout)
    assert result["verdict"] == "passed" and [r["context"] for r in result["evidence"]["fits"]] == [64, 256]
    assert result["evidence"]["fits"][0]["batch"] > result["evidence"]["fits"][1]["batch"] >= 1
