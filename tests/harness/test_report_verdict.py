"""What a run says as a whole: VALIDATED is earned, and nothing else is called so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_sample import case, good_results, laptop, mixed_results, record_of, spark, train
from sparkproof.report.runrecord import RunRecord
from sparkproof.results import CaseResult, ReasonClass, Verdict


def with_one(tmp_path: Path, extra: CaseResult, **more: Any) -> RunRecord:
    return record_of(tmp_path, [*good_results(), extra], **more)


def skipped(reason: ReasonClass) -> CaseResult:
    return case("x/skipped", verdict=Verdict.SKIPPED, reason_class=reason, reason="so it is", assertions=[], mode="")


def test_validated_is_said_of_the_target_after_a_whole_good_profile(tmp_path: Path) -> None:
    record = record_of(tmp_path, good_results())
    assert record.validated
    assert (
        record.sentence
        == "VALIDATED: NVIDIA GB10, 12.1, 48 SMs, 119.7 GiB unified passed all 24 cases of profile quick."
    )
    assert record.verdict.answer == "yes" and record.verdict.answer_sentence.startswith(
        "Yes: training learnt on NVIDIA"
    )


@pytest.mark.parametrize("reason", [ReasonClass.ARCH, ReasonClass.PLATFORM, ReasonClass.COMPUTE_CAPABILITY])
def test_a_case_for_other_devices_does_not_count(tmp_path: Path, reason: ReasonClass) -> None:
    record = with_one(tmp_path, skipped(reason))
    assert record.validated and "(1 case is not for this device)" in record.sentence


@pytest.mark.parametrize(
    "reason", [r for r in ReasonClass if r.value not in ("arch", "platform", "compute-capability", "no-engine")]
)
def test_any_other_skip_withholds_it(tmp_path: Path, reason: ReasonClass) -> None:
    record = with_one(tmp_path, skipped(reason))
    assert (
        not record.validated and f"1 case that the profile requires could not run ({reason.value})" in record.sentence
    )
    assert "24 of 25 cases passed, 1 not run" in record.sentence


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        (Verdict.FAILED, "1 case failed (x/one)"),
        (Verdict.BROKEN, "1 case is broken (x/one)"),
        (Verdict.RETEST, "1 case must be measured again (x/one)"),
    ],
)
def test_one_bad_case_withholds_it(tmp_path: Path, verdict: Verdict, says: str) -> None:
    record = with_one(tmp_path, case("x/one", "export", verdict))
    assert record.sentence.startswith(f"NOT VALIDATED: {says}")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"ended": False}, "the run did not end"),
        ({"interrupted": True}, "the run was interrupted"),
        ({"planned_only": ("k/left",)}, "1 planned case left no result"),
        ({"ended": False, "planned_only": ("k/a", "k/b")}, "the run did not end with 2 cases left"),
        ({"mode": "selection"}, "only a selection of profile quick was run"),
        ({"facts": laptop()}, "no GPU"),
    ],
)
def test_a_run_that_is_not_whole_withholds_it(tmp_path: Path, how: dict[str, Any], says: str) -> None:
    record = record_of(tmp_path, good_results(), **how)
    assert not record.validated and record.sentence.startswith("NOT VALIDATED: ") and says in record.sentence


def test_another_gpu_and_replayed_facts_withhold_it(tmp_path: Path) -> None:
    other = spark()
    other.arch = "x86_64"
    assert "not the target device but NVIDIA GB10" in record_of(tmp_path, good_results(), other).sentence
    replayed = spark()
    replayed.origin = "constructed from published outputs: x"
    assert "the facts were not read here" in record_of(tmp_path, good_results(), replayed).sentence


def test_a_spark_whose_kernels_ran_elsewhere_is_not_validated(tmp_path: Path) -> None:
    record = with_one(tmp_path, case("kernels/x", mode="interpreter"))
    assert "though there is a GPU, kernels ran in the interpreter" in record.sentence


def test_a_profile_without_training_validates_nothing(tmp_path: Path) -> None:
    record = record_of(tmp_path, [r for r in good_results() if r.kind != "train"])
    assert record.sentence.startswith("NOT VALIDATED: no training was shown to learn on the GPU; 22 of 22")


def test_nothing_at_all(tmp_path: Path) -> None:
    record = record_of(tmp_path, [])
    assert record.sentence == "NOT VALIDATED: nothing passed; 0 of 0 cases passed." and record.exit_code == 2


def test_without_a_gpu_it_says_how_things_ran(tmp_path: Path) -> None:
    results = [case("kernels/x", mode="interpreter"), train("hf", mode="host"), skipped(ReasonClass.GPU)]
    record = record_of(tmp_path, results, laptop())
    assert record.sentence == (
        "NOT VALIDATED: no GPU, so kernels ran in the interpreter; 2 of 3 cases passed, 1 not run."
    )
    assert record.verdict.answer == "not shown" and "there is no GPU" in record.verdict.answer_sentence


@pytest.mark.parametrize(
    ("results", "answer", "says"),
    [
        ([train("hf")], "yes", "Yes: training learnt on NVIDIA GB10"),
        ([train("hf"), case("export/x", "export", Verdict.FAILED)], "yes", "but 1 case of export failed"),
        ([train("hf"), train("unsloth", verdict=Verdict.SKIPPED)], "yes", "1 training case gave no verdict"),
        ([train("hf", verdict=Verdict.FAILED, reason="Loss is flat.")], "no", "Loss is flat."),
        ([train("hf"), train("sparktune", verdict=Verdict.FAILED)], "no", "No, not dependably"),
        ([train("hf"), case("kernels/x", verdict=Verdict.FAILED, reason="dx is off.")], "not shown", "dx is off."),
        ([train("hf", mode="host")], "not shown", "the GPU was not used"),
        ([train("hf", verdict=Verdict.BROKEN, reason="Oops.")], "not shown", "could not be judged. Oops."),
        ([train("hf", verdict=Verdict.SKIPPED, reason="No disk.")], "not shown", "No disk."),
        ([case("k/a")], "not shown", "no training case was part of this run"),
    ],
)
def test_can_this_machine_fine_tune(tmp_path: Path, results: list[CaseResult], answer: str, says: str) -> None:
    verdict = record_of(tmp_path, results).verdict
    assert (verdict.answer, says in verdict.answer_sentence) == (answer, True), verdict.answer_sentence
    assert "\n" not in verdict.answer_sentence


def test_training_that_was_never_reached(tmp_path: Path) -> None:
    record = record_of(tmp_path, [case("k/a")], planned_only=("train/x",), interrupted=True)
    assert record.verdict.answer_sentence == "Not shown: the run ended before a training case did."


def test_every_case_is_counted_once(tmp_path: Path) -> None:
    counts = record_of(tmp_path, mixed_results(), planned_only=("k/left",)).verdict.counts
    assert counts["total"] == sum(n for name, n in counts.items() if name != "total") == 26
