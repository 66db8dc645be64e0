"""A training run's speed: what is measured of it, and when it can't be judged. Device and NVML are stand-ins."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from report_sample import laptop, spark
from sparkproof.facts.model import Facts
from sparkproof.judge.steady import steady
from sparkproof.measure.canaries import Watch
from sparkproof.measure.useful import Work
from sparkproof.results import Assertion, CaseResult, Measurement, Verdict
from sparkproof.runners.train_measure import measurements
from sparkproof.scenario import TrainScenario

GOOD: dict[str, Any] = {
    "copy_gb_s": 186.0, "gemv_gb_s": 231.0, "gemm_tflops": 61.0, "load_clock_mhz": 2405, "load_power_w": 92.0,
    "load_temperature_c": 61.0, "load_throttle_reasons": ["software power cap"],
}  # fmt: skip
DURING: dict[str, Any] = {
    "clock_mhz": 2410, "power_w": 88.0, "temperature_c": 63.0, "slowdowns": [], "max_clock_mhz": 3003, "energy_j": 1410.0,
}  # fmt: skip


def judged(before: dict[str, Any], after: dict[str, Any], during: dict[str, Any], facts: Facts) -> tuple[Verdict, str]:
    learnt = Assertion(name="learnt", passed=True)
    found = [learnt, *steady(before, after, during, facts)]
    assert all(a.about == "speed" for a in found[1:])
    return CaseResult.decide(found, speed_trusted=all(a.passed for a in found))


def test_a_steady_spark_is_judged() -> None:
    assert judged(GOOD, GOOD, DURING, spark()) == (Verdict.PASSED, "")
    names = [a.name for a in steady(GOOD, GOOD, DURING, spark())]
    assert {"copy canary after, against before", "GEMV beside the copy", "clock under load", "GEMM canary"} <= set(
        names
    )


@pytest.mark.parametrize(
    ("before", "after", "during", "said"),
    [
        ({}, {"copy_gb_s": 176.0}, {}, "The copy canary moved from 186 to 176 GB/s"),
        ({}, {"gemv_gb_s": 200.0}, {}, "The GEMV canary moved from 231 to 200 GB/s"),
        ({}, {"gemm_tflops": 52.0}, {}, "The GEMM canary moved from 61 to 52 TFLOP/s"),
        ({"gemv_gb_s": 70.0}, {"gemv_gb_s": 70.0}, {}, "the hidden slow state of row 49"),
        ({"load_clock_mhz": 850, "load_power_w": 27.0}, {}, {}, "850 MHz at 27 W, as in the low-power state of row 48"),
        ({"copy_gb_s": 120.0}, {"copy_gb_s": 120.0}, {}, "The copy canary gave 120 GB/s; a healthy device has 150"),
        ({}, {}, {"slowdowns": ["hardware thermal slowdown"]}, "The clock was held down: hardware thermal slowdown"),
        ({}, {"load_throttle_reasons": ["hardware power brake"]}, {}, "held down: hardware power brake"),
        ({}, {"error": "only 0.4 GiB are free above the floor; 1.5 are needed"}, {}, "not taken: only 0.4 GiB"),
    ],
)  # fmt: skip
def test_each_unsteadiness_is_a_retest_with_its_own_sentence(
    before: dict[str, Any], after: dict[str, Any], during: dict[str, Any], said: str
) -> None:
    verdict, reason = judged({**GOOD, **before}, {**GOOD, **after}, {**DURING, **during}, spark())
    assert verdict is Verdict.RETEST and reason.startswith("Speed can't be judged: ") and said in reason
    assert reason.count(". ") == 0 and reason.endswith(".")


def test_elsewhere_the_clock_is_held_to_its_own_highest() -> None:
    card = laptop()
    low, nothing = {**GOOD, "load_clock_mhz": 800}, {**GOOD}
    nothing.pop("load_clock_mhz")
    assert judged(low, low, DURING, card)[0] is Verdict.RETEST
    assert judged(low, low, {}, card)[0] is Verdict.PASSED, "without a highest clock there is nothing to hold it to"
    assert judged(nothing, nothing, DURING, card)[0] is Verdict.PASSED, "NVML need not tell the clock"
    slow = {**GOOD, "copy_gb_s": 90.0, "gemv_gb_s": 85.0}
    assert judged(slow, slow, DURING, card)[0] is Verdict.PASSED, "no figures are published for this device"


def test_what_failed_fails_however_unsteady_the_clock_was() -> None:
    found = [Assertion(name="learnt", passed=False), *steady(GOOD, {"error": "x"}, {}, spark())]
    assert CaseResult.decide(found, speed_trusted=False)[0] is Verdict.FAILED


class FakeSensors:
    """Counts readings; takes 25 J in all."""

    def __init__(self, tells: bool = True) -> None:
        self.reads, self.tells = 0, tells
        self.meter = iter((1_000_000, 1_025_000))

    def read(self) -> None:
        self.reads += 1

    def energy_mj(self) -> int | None:
        return next(self.meter) if self.tells else None

    def max_clock_mhz(self) -> int | None:
        return 3003 if self.tells else None

    def summary(self) -> dict[str, Any]:
        known = {"load_clock_mhz": 2400, "load_power_w": 90.0, "load_temperature_c": 60.0}
        return {"load_throttle_reasons": [], **(known if self.tells else {})}


def test_sensors_are_read_while_it_runs_and_energy_is_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkproof.measure.canaries.PERIOD_S", 0.01)
    sensors = FakeSensors()
    with Watch(sensors) as watch:
        time.sleep(0.2)
    seen = sensors.reads
    time.sleep(0.05)
    assert sensors.reads == seen > 1
    assert watch.summary() == {
        "clock_mhz": 2400, "power_w": 90.0, "temperature_c": 60.0, "slowdowns": [], "max_clock_mhz": 3003, "energy_j": 25.0,
    }  # fmt: skip
    with Watch(FakeSensors(tells=False)) as silent:
        pass
    assert silent.summary() == {"slowdowns": []}


def config(**more: Any) -> Any:
    from transformers import LlamaConfig

    base = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{**base, "num_key_value_heads": 2, "vocab_size": 1000, "head_dim": 16, **more})


def test_useful_work_is_that_of_real_tokens() -> None:
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    work = Work.of(config(), lora_elements=5000, load_in_4bit=True)
    assert work.per_token == 4 * weights + 6 * 5000 + 4 * 1000 * 64
    assert work.flops([10, 30]) == 40 * work.per_token + 7 * 2 * 64 * (100 + 900)
    assert work.flops([40]) > work.flops([20, 20]), "attention is that of each row"
    assert 2 * (0.5 * weights + 64_000 * 2) < work.bytes < 2 * (0.6 * weights + 64_000 * 2)
    assert work.floor_s(1e9, 1e12, 1e9) == pytest.approx(1e-3 + work.bytes / 1e9)
    with pytest.raises(ValueError, match="num_local_experts"):
        Work.of(config(num_local_experts=4), 0, True)


def seen(**more: Any) -> dict[str, Any]:
    """What a training phase returned: three steps of warm-up, then four."""
    return {
        "seconds": [9.0, 1.0, 1.0, 0.10, 0.20, 0.10, 0.10], "tokens": [100] * 7, "load_s": 3.0,
        "conditions": {"device": "NVIDIA GB10"}, "ran": {"mode": "gpu"}, "canaries": {"before": GOOD, "after": GOOD},
        "during": DURING, "work": {"flops": [1.22e12] * 7, "bytes": 9.3e9},
        "memory": {"peak_rss_gib": 2.0, "peak_gpu_allocated_gib": 1.5, "peak_gpu_reserved_gib": 1.75}, **more,
    }  # fmt: skip


def by_name(ran: dict[str, Any]) -> dict[str, Measurement]:
    gate = {
        "first_loss": [1, 2], "first_grad_norm": [0, 1], "min_loss_fall": 1, "canary_prompt": "q", "canary_answer": "a",
    }  # fmt: skip
    s = TrainScenario.model_validate({"kind": "train", "summary": "numbers of a stand-in", "gate": gate})
    return {m.name: m for m in measurements(s, ran, 2.5, 7.5)}


def test_every_measurement_has_unit_direction_samples_and_conditions() -> None:
    m = by_name(seen())
    assert m["tokens_per_s"].value == pytest.approx(800) and m["tokens_per_s"].samples == pytest.approx(
        [1000, 500, 1000, 1000]
    )
    assert m["step_p50_ms"].value == pytest.approx(100) and 100 < m["step_p95_ms"].value < 200
    assert m["MFU"].value == pytest.approx(100 * 4 * 1.22e12 / 0.5 / 61e12) and len(m["MFU"].samples) == 4
    assert m["speed of light"].value == pytest.approx(100 * 4 * (1.22 / 61 + 9.3 / 186) / 0.5)
    assert m["energy a token"].value == pytest.approx(1e3 * 1410 / 700) and m["energy a token"].unit == "mJ"
    assert (m["peak_rss_gib"].value, m["peak_machine_gib"].value) == (2.5, 7.5)
    assert m["peak_gpu_reserved_gib"].value == 1.75
    for one in m.values():
        assert one.unit and one.higher_is_better is not None and math.isfinite(one.value)
        assert one.conditions["clock_mhz"] == 2410 and one.conditions["canary_gemv_gb_s"] == 231.0
        assert one.conditions["temperature_c"] == 63.0 and one.conditions["power_w"] == 88.0
    assert not m["step_p95_ms"].higher_is_better and m["MFU"].higher_is_better


def test_what_was_not_measured_is_left_out() -> None:
    bare = by_name(seen(canaries={"before": {}}, during={}, work={"why_not": "experts"}, memory={"peak_rss_gib": 2.0}))
    assert {"MFU", "speed of light", "energy a token", "peak_gpu_allocated_gib"}.isdisjoint(bare)
    assert "tokens_per_s" in bare and "clock_mhz" not in bare["tokens_per_s"].conditions
