"""Every check against the recorded facts: fires where its failure is, and is quiet everywhere else.

The table is complete: each file is judged by all checks, so a check that began to fire on a healthy machine, or on
another failure's facts, fails here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sparkproof.checks.catalogue import CATALOGUE
from sparkproof.checks.finding import Outcome
from sparkproof.checks.registry import evaluate, run_checks
from sparkproof.facts.collect import load
from sparkproof.facts.model import Facts

FOLDER = Path(__file__).parents[1] / "facts"
BY_DESIGN = {("memory.nvml", "info")}  # a healthy Spark shows this, harmless and explained

# file -> all findings besides BY_DESIGN on GB10 files
EXPECTED: dict[str, set[tuple[str, str]]] = {
    "gb10_healthy": set(),
    "n1x_healthy": set(),
    "x86_rtx4090": set(),
    "x86_laptop": set(),
    "gb10_no_gpus_flag": {("gpu.unusable", "error")},
    "gb10_wedged": {("gpu.unusable", "error")},
    "gb10_triton35": {("triton.ptxas", "error")},
    "gb10_stale_variable": {("triton.variable", "info")},
    "gb10_capability_warning": {("gpu.capability_warning", "info")},
    "gb10_cpu_torch": {("torch.cpu_build", "error")},
    "gb10_no_headers": {("python.headers", "error"), ("python.compiler", "error")},
    "gb10_page_cache": {("memory.page_cache", "warning")},
    "gb10_memory_held": {("memory.held", "warning")},
    "gb10_neighbours": {("memory.floor", "error"), ("memory.neighbours", "warning"), ("memory.allocator", "warning")},
    "gb10_small_shm": {("container.shm", "warning"), ("container.limits", "warning")},
    "gb10_docker_denied": {("container.access", "error")},
    "gb10_no_nvidia_runtime": {("container.gpu_runtime", "error")},
    "gb10_driver_mismatch": {("driver.mismatch", "error")},
    "gb10_mixed_packages": {
        ("python.externally_managed", "warning"),
        ("python.requirements", "warning"),
        ("bitsandbytes.cuda_library", "error"),
        ("downloads.hf_transfer", "error"),
    },
    "gb10_hot": {("gpu.throttled", "warning")},
    "x86_t4": {("gpu.shared_memory", "warning")},
    "x86_avx512_bf16": {("bitsandbytes.avx512_repack", "warning")},
}
# words that the evidence must hold: what was seen, not only that something was
EVIDENCE = {
    "gpu.unusable": ["no /dev/nvidia*", "no answer within 60 s"],
    "gpu.capability_warning": ["cuda capability 12.1"],
    "gpu.shared_memory": ["65536", "101376"],
    "gpu.throttled": ["hardware thermal slowdown", "92 C"],
    "driver.mismatch": ["Driver/library version mismatch", "580.95.05"],
    "torch.cpu_build": ["2.9.1+cpu", "torch.version.cuda is None"],
    "triton.ptxas": ["12.8.93", "sm_121a"],
    "triton.variable": ["TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas", "ptxas-blackwell"],
    "python.headers": ["/usr/include/python3.12/Python.h"],
    "python.compiler": ["gcc"],
    "python.externally_managed": ["/usr/bin/python3"],
    "python.requirements": ["trl<=0.24.0"],
    "memory.nvml": ["Not Supported"],
    "memory.page_cache": ["52.0", "2.8"],
    "memory.held": ["73.1", "Xorg"],
    "memory.floor": ["9.1"],
    "memory.neighbours": ["VLLM::EngineCore 4411", "101.5"],
    "memory.allocator": ["expandable_segments:True"],
    "container.access": ["permission denied"],
    "container.gpu_runtime": ["runc"],
    "container.shm": ["0.06 GiB"],
    "container.limits": ["8192 KiB"],
    "bitsandbytes.avx512_repack": ["8481C", "0.50.2"],
    "bitsandbytes.cuda_library": ["118, 128, 129", "13.0"],
    "downloads.hf_transfer": ["HF_HUB_ENABLE_HF_TRANSFER=1", "0.36.0"],
}
HEALTHY = ["gb10_healthy", "n1x_healthy", "x86_rtx4090", "x86_laptop"]


def facts_of(name: str) -> Facts:
    return load(FOLDER / f"{name}.json")


def outcomes_of(name: str) -> dict[str, Outcome]:
    return {o.check: o for o in run_checks(facts_of(name))}


def test_every_file_is_in_the_table() -> None:
    assert set(EXPECTED) == {p.stem for p in FOLDER.glob("*.json")}


@pytest.mark.parametrize("name", EXPECTED)
def test_findings_of_file(name: str) -> None:
    found = {(f.check, f.severity.value) for o in outcomes_of(name).values() for f in o.findings}
    assert found - BY_DESIGN == EXPECTED[name]


@pytest.mark.parametrize("check_id", CATALOGUE)
def test_check_fires_somewhere_with_its_evidence(check_id: str) -> None:
    seen = [
        f.evidence
        for name in EXPECTED
        for f in outcomes_of(name)[check_id].findings
        if (check_id, f.severity.value) in EXPECTED[name] | BY_DESIGN
    ]
    assert seen, f"no recorded facts show {check_id}"
    for words in EVIDENCE[check_id]:
        assert any(words in text for text in seen), f"{words!r} is in none of {seen}"


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("check_id", CATALOGUE)
def test_check_is_quiet_on_healthy_machine(check_id: str, name: str) -> None:
    outcome = evaluate(check_id, facts_of(name))
    assert all(f.severity.value == "info" for f in outcome.findings)
    assert outcome.state != "not read", f"{name} has all facts: {outcome.seen}"
    assert outcome.seen, "a quiet check says what it saw"


@pytest.mark.parametrize("name", ["gb10_healthy", "n1x_healthy"])
def test_healthy_spark_is_judged_in_full(name: str) -> None:
    """Nothing but what is about other machines may step aside on the target."""
    aside = {o.check for o in outcomes_of(name).values() if not o.judged}
    assert aside == {"container.limits", "bitsandbytes.avx512_repack"}, "not in a container; no x86"


def test_laptop_has_no_gpu_findings_and_says_why() -> None:
    outcomes = outcomes_of("x86_laptop")
    for check_id in ("gpu.unusable", "gpu.shared_memory", "torch.cpu_build", "driver.mismatch", "memory.held"):
        assert outcomes[check_id].state == "not applicable"
        assert outcomes[check_id].lacks == "no-gpu"
    assert "no NVIDIA GPU" in outcomes["gpu.unusable"].seen


def test_empty_facts_are_never_judged_well() -> None:
    """What was not read gives neither a finding nor an all-clear, but for checks that need no fact to be there."""
    outcomes = run_checks(Facts(origin="nothing was read"))
    assert not [o for o in outcomes if o.findings]
    assert {o.check for o in outcomes if o.state == "ok"} == set()
