"""The branches of checks that judge trials: attention, shared memory, canaries, compilation, 4 bits, extensions."""

from __future__ import annotations

from typing import Any

import pytest
from sparkproof.checks.registry import evaluate
from sparkproof.facts.model import Facts
from sparkproof.facts.tried import Extension
from test_checks_logic import change, one, quiet

UNUSABLE = {"gpus__0__usable_by_torch": False}


def rows(change_row: Any) -> Facts:
    """The healthy attention matrix, each row passed through a function."""
    facts = change("gb10_healthy")
    data = facts.model_dump(mode="json")
    data["tried"]["attention"] = [change_row(dict(r)) for r in data["tried"]["attention"]]
    return Facts.model_validate(data)


# --- attention


def test_wrong_values_in_16_bits_are_an_error() -> None:
    facts = rows(lambda r: r | {"error": 0.2} if (r["backend"], r["dtype"]) == ("cudnn", "bf16") and r["error"] else r)
    found = one("attention.backends", facts)
    assert found.severity == "error" and "cudnn forward in bf16 with heads of 64 is off by 0.2" in found.evidence


def test_a_nan_is_wrong() -> None:
    facts = rows(lambda r: r | {"error": float("inf")} if r["backend"] == "flash" and r["error"] else r)
    assert {f.severity.value for f in evaluate("attention.backends", facts).findings} == {"error"}


def test_only_the_slow_path_left_is_a_warning() -> None:
    def refuse(r: dict[str, Any]) -> dict[str, Any]:
        return r | {"error": None, "refused": "no kernel"} if r["backend"] in ("flash", "efficient", "cudnn") else r

    found = one("attention.backends", rows(refuse))
    assert found.severity == "warning" and "no fused backend works in bf16" in found.evidence
    assert "backward with heads of 128" in found.evidence


def test_refusals_by_design_are_no_fault() -> None:
    outcome = quiet("attention.backends", change("gb10_healthy"))
    assert outcome.state == "ok" and "flash 10" in outcome.seen and "math 18" in outcome.seen


def test_a_backend_that_killed_its_process_is_an_error() -> None:
    dead = {"error": None, "refused": "the trial stopped while it tried efficient ...: exit code -6"}
    facts = rows(
        lambda r: r | dead if (r["backend"], r["dtype"], r["direction"]) == ("efficient", "fp32", "forward") else r
    )
    assert all(f.severity == "error" for f in evaluate("attention.backends", facts).findings)


def test_flex_too_slow_to_judge_is_not_judged() -> None:
    late = {"error": None, "refused": "the trial stopped while it compiled ...: no answer within 30 s"}
    facts = rows(lambda r: r | late if r["backend"] == "flex" else r)
    assert quiet("attention.flex", facts).state == "not read"
    wrong = rows(lambda r: r | {"error": 0.5} if r["backend"] == "flex" else r)
    assert len(evaluate("attention.flex", wrong).findings) == 2


@pytest.mark.parametrize("check_id", ["attention.backends", "attention.flex", "power.clock", "power.canaries"])
def test_without_a_trial_nothing_is_said(check_id: str) -> None:
    facts = change("gb10_healthy", tried__attention=None, tried__canaries=None)
    assert quiet(check_id, facts).state == "not read"
    assert quiet(check_id, change("gb10_healthy", **UNUSABLE)).state == "not applicable"


def test_an_extension_that_was_not_called_is_not_called_good() -> None:
    assert quiet("attention.extensions", change("gb10_healthy", packages={"xformers": "0.0.33"})).state == "not read"
    good = change(
        "gb10_healthy",
        packages={"xformers": "0.0.33"},
        tried__extensions=[{"name": "xformers", "version": "0.0.33"}],
    )
    assert "xformers 0.0.33 computed" in quiet("attention.extensions", good).seen


# --- shared memory


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"fits_ran": False, "error": "its launch failed"}, "error", "did not run right: its launch failed"),
        ({"fits_ran": False}, "error", "its product is wrong"),
        ({"over_raised": None}, "warning", "was launched and not refused"),
        ({"alive_after": False, "error": "illegal access"}, "warning", "the GPU computed no more: illegal access"),
        ({"over_raised": "RuntimeError: CUDA error 700"}, "warning", "ended with another error: RuntimeError"),
    ],
)
def test_shared_memory_kernels(changes: dict[str, Any], severity: str, words: str) -> None:
    facts = change("gb10_healthy", **{f"tried__shared_memory__{k}": v for k, v in changes.items()})
    found = one(
        "gpu.shared_memory_limit",
        facts,
    )
    assert found.severity == severity and words in found.evidence


def test_shared_memory_that_was_not_tried() -> None:
    assert quiet("gpu.shared_memory_limit", change("gb10_healthy", tried__shared_memory=None)).state == "not read"
    gone = {"limit": 0, "error": "the trial stopped while it imported torch: died"}
    outcome = quiet("gpu.shared_memory_limit", change("gb10_healthy", tried__shared_memory=gone))
    assert outcome.state == "not read" and "died" in outcome.seen


# --- canaries


@pytest.mark.parametrize(("mhz", "state"), [(1399, "found"), (1400, "ok"), (None, "not read")])
def test_the_clock_of_a_gb10(mhz: int | None, state: str) -> None:
    assert evaluate("power.clock", change("gb10_healthy", tried__canaries__load_clock_mhz=mhz)).state == state


def test_the_clock_of_an_unknown_device_is_judged_by_its_highest() -> None:
    slow = change("x86_rtx4090", tried__canaries__load_clock_mhz=1390)
    assert one("power.clock", slow).severity == "warning"
    assert quiet("power.clock", change("x86_rtx4090", tried__canaries__load_clock_mhz=1400)).state == "ok"


def test_a_reason_for_a_low_clock_is_shown() -> None:
    facts = change(
        "gb10_low_power", tried__canaries__load_throttle_reasons=["software power cap", "hardware thermal slowdown"]
    )
    assert "reasons: hardware thermal slowdown" in one("power.clock", facts).evidence


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"gemv_gb_s": 159.0}, "found"),
        ({"copy_gb_s": 149.0}, "found"),
        ({"gemm_tflops": 34.0}, "found"),
        ({"gemm_tflops": None}, "ok"),
        ({"gemv_gb_s": None}, "not read"),
        ({"error": "the trial stopped while it timed copies: died"}, "not read"),
        ({"error": "only 0.2 GiB are free above the floor; 1.5 are needed"}, "not applicable"),
    ],
)
def test_canaries_of_a_gb10(changes: dict[str, Any], state: str) -> None:
    facts = change("gb10_healthy", **{f"tried__canaries__{k}": v for k, v in changes.items()})
    assert evaluate("power.canaries", facts).state == state


def test_figures_of_a_spark_are_not_asked_of_another_device() -> None:
    facts = change("x86_rtx4090", tried__canaries={"copy_gb_s": 100.0, "gemv_gb_s": 90.0, "gemm_tflops": 5.0})
    assert "only their ratio was judged" in quiet("power.canaries", facts).seen


# --- Triton


def test_compilations_that_differ_without_a_cache_are_a_warning() -> None:
    found = one("triton.compile", change("gb10_healthy", tried__compilation__again_binary="1" * 64))
    assert found.severity == "warning" and "different code" in found.evidence


def test_a_compilation_that_fails() -> None:
    error = {"error": "the cold compilation: boom"}
    assert one("triton.compile", change("gb10_healthy", tried__compilation=error)).severity == "error"
    assert one("triton.compile", change("x86_laptop", tried__compilation=error)).severity == "warning"
    explained = quiet("triton.compile", change("gb10_triton35", tried__compilation=error))
    assert explained.seen == "explained by triton.ptxas"
    assert quiet("triton.fp4", change("gb10_triton35")).seen == "explained by triton.ptxas"
    assert quiet("triton.compile", change("gb10_healthy", tried__compilation=None)).state == "not read"


def test_the_trial_decides_which_variable_is_live() -> None:
    """What Triton says it would take is overruled by what a compilation with a failing assembler shows."""
    facts = change("gb10_stale_variable", tried__compilation__live_variables=["TRITON_PTXAS_PATH"])
    assert quiet("triton.variable", facts).state == "ok"
    proven = one("triton.variable", change("gb10_stale_variable"))
    assert "as a compilation with a failing assembler shows" in proven.evidence
    unproven = one("triton.variable", change("gb10_stale_variable", tried__compilation=None))
    assert "failing assembler" not in unproven.evidence


# --- bitsandbytes, torchvision, cuDNN, Unsloth


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"error": "RuntimeError: no kernel image"}, "no kernel image"),
        ({"relative_error": 0.0}, "come back 0.0 off"),
        ({"relative_error": 1.0}, "come back 1.0 off"),
        ({"relative_error": None}, "come back None off"),
        ({"product_error": 0.5}, "product or gradient is 0.5 off"),
        ({"product_error": float("nan")}, "product or gradient is nan off"),
        ({"has_statistics": False}, "Params4bit without compress_statistics"),
    ],
)
def test_four_bit_faults(changes: dict[str, Any], words: str) -> None:
    healthy = change("gb10_healthy").tried.four_bit[0].model_copy(update=changes)
    facts = change("gb10_healthy")
    facts.tried.four_bit = [healthy]
    assert words in one("bitsandbytes.round_trip", facts).evidence


def test_cudnn_by_its_convolution() -> None:
    facts = change("gb10_healthy", tried__convolution=False, tried__convolution_error="CUDNN_STATUS_NOT_INITIALIZED")
    assert "CUDNN_STATUS" in one("torch.cudnn", facts).evidence
    assert quiet("torch.cudnn", change("gb10_healthy", tried__convolution=None)).state == "not read"
    assert "libcudnn.so.9" in quiet("torch.cudnn", change("gb10_healthy")).seen


def test_unsloth_that_imports_and_that_ends_otherwise() -> None:
    def unsloth(**fields: Any) -> Facts:
        return change("gb10_healthy", unsloth={"version": "2026.10.1", "zoo_version": "2026.10.1", **fields})

    assert quiet("unsloth.imports", unsloth(imported=True)).state == "ok"
    assert "ended with this error" in one("unsloth.imports", unsloth(imported=False, import_error="OSError: x")).cause
    assert quiet("unsloth.imports", unsloth()).state == "not read"
    assert quiet("unsloth.offload", unsloth(knows_unified_memory=True)).state == "ok"
    assert quiet("unsloth.offload", unsloth()).state == "not read"
    off = unsloth(knows_unified_memory=False)
    off.env["UNSLOTH_DISABLE_DOUBLE_BUFFER"] = "1"
    assert quiet("unsloth.offload", off).state == "ok"


LATE = "no answer within 40 s"


def four_bit_late(facts: Facts) -> None:
    facts.tried.four_bit = [facts.tried.four_bit[0].model_copy(update={"error": f"the trial stopped: {LATE}"})]


def vision_late(facts: Facts) -> None:
    facts.packages["torchvision"] = "0.29.1"
    facts.tried.extensions = [Extension(name="torchvision", version="0.29.1", error=LATE)]


def torch_late(facts: Facts) -> None:
    facts.torch = facts.torch.model_copy(update={"version": None, "cuda": None, "error": f"importing torch: {LATE}"})
    facts.gpus = [g.model_copy(update={"usable_by_torch": False}) for g in facts.gpus]


def compilation_late(facts: Facts) -> None:
    assert facts.tried.compilation is not None
    facts.tried.compilation = facts.tried.compilation.model_copy(update={"error": f"the cold compilation: {LATE}"})


def kernels_late(facts: Facts) -> None:
    assert facts.tried.shared_memory is not None
    facts.tried.shared_memory = facts.tried.shared_memory.model_copy(update={"fits_ran": False, "error": LATE})


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("bitsandbytes.round_trip", four_bit_late), ("torch.vision", vision_late), ("gpu.unusable", torch_late),
        ("triton.compile", compilation_late), ("gpu.shared_memory_limit", kernels_late),
    ],
)  # fmt: skip
def test_a_trial_that_met_its_time_limit_is_no_failure_with_a_reinstallation_for_cure(name: str, spoil: Any) -> None:
    facts = change("gb10_healthy")
    spoil(facts)
    outcome = quiet(name, facts)
    assert outcome.state == "not read"
    assert LATE in outcome.seen and "try again when it is idle" in outcome.seen
