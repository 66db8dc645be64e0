"""The branches inside the checks: which cause is named, which severity, and where a check must hold its tongue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sparkproof.checks.finding import Finding, Outcome
from sparkproof.checks.registry import evaluate
from sparkproof.facts.collect import load
from sparkproof.facts.model import Facts

FOLDER = Path(__file__).parents[1] / "facts"


def change(name: str, **changes: Any) -> Facts:
    """Recorded facts with fields replaced: `driver__device_files=[]`, `gpus__0__integrated=False`."""
    data = load(FOLDER / f"{name}.json").model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split("__")
        target: Any = data
        for part in path:
            target = target[int(part) if isinstance(target, list) else part]
        target[int(last) if isinstance(target, list) else last] = value
    return Facts.model_validate(data)


def one(check_id: str, facts: Facts) -> Finding:
    outcome = evaluate(check_id, facts)
    assert len(outcome.findings) == 1, outcome
    return outcome.findings[0]


def quiet(check_id: str, facts: Facts) -> Outcome:
    outcome = evaluate(check_id, facts)
    assert not outcome.findings
    return outcome


UNUSABLE = {"gpus__0__usable_by_torch": False}


# --- gpu.unusable: the broken link between the bus and torch is named


def test_hidden_by_variable() -> None:
    for value in ("", "-1"):
        found = one("gpu.unusable", change("gb10_healthy", env={"CUDA_VISIBLE_DEVICES": value}, **UNUSABLE))
        assert found.fix == "unset CUDA_VISIBLE_DEVICES"
    seen = one("gpu.unusable", change("gb10_wedged", env={"CUDA_VISIBLE_DEVICES": "0"}))
    assert "wedged" in seen.cause, "a variable that selects a GPU hides nothing"


def test_container_without_gpu_differs_from_host_without_driver() -> None:
    nothing: dict[str, Any] = {"gpus": [], "driver__device_files": []}
    assert "--gpus all" in one("gpu.unusable", change("gb10_healthy", os__in_container=True, **nothing)).fix
    host = one("gpu.unusable", change("gb10_healthy", driver__kernel_module_version=None, **nothing))
    assert "not loaded" in host.cause and "modprobe" in host.fix
    nouveau = change("gb10_healthy", driver__kernel_module_version=None, driver__pci_driver="nouveau", **nothing)
    assert "nouveau" in one("gpu.unusable", nouveau).cause
    loaded = one("gpu.unusable", change("gb10_healthy", **nothing))
    assert "device files" in loaded.cause and "nvidia-modprobe" in loaded.fix


def test_laptop_with_nvidia_hardware_and_no_driver_is_a_finding() -> None:
    facts = change("x86_laptop", driver__pci_devices=["0000:01:00.0"], driver__pci_driver="nouveau")
    assert one("gpu.unusable", facts).severity == "error"
    assert quiet("torch.cpu_build", facts).state == "not applicable", "the driver comes first"


def test_denied_device_files() -> None:
    found = one("gpu.unusable", change("gb10_healthy", driver__denied_device_files=["/dev/nvidia0"], **UNUSABLE))
    assert "/dev/nvidia0" in found.evidence and "usermod" in found.fix


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12040).", "serves CUDA 13.0"),
        ("CUDA error: no kernel image is available for execution on the device", "no code for the GPU"),
        ("CUDA out of memory. Tried to allocate 2 MiB", "Nothing is left"),
        ("torch stopped while it started CUDA: no answer within 60 s", "wedged"),
        ("the product of two bf16 matrices is off by 16.2", "wedged"),
    ],
)
def test_cause_by_torch_error(error: str, word: str) -> None:
    found = one("gpu.unusable", change("gb10_healthy", torch__error=error, **UNUSABLE))
    assert word in found.cause and error in found.evidence


def test_torch_missing_beside_a_gpu() -> None:
    facts = change("gb10_healthy", torch={"error": "import torch: ModuleNotFoundError"}, **UNUSABLE)
    assert "ModuleNotFoundError" in one("gpu.unusable", facts).evidence


def test_one_failure_is_reported_once() -> None:
    assert quiet("gpu.unusable", load(FOLDER / "gb10_cpu_torch.json")).seen == "explained by torch.cpu_build"
    assert quiet("gpu.unusable", load(FOLDER / "gb10_driver_mismatch.json")).seen == "explained by driver.mismatch"


def test_wsl_has_no_device_files_and_that_is_fine() -> None:
    wsl = {"driver__wsl": True, "driver__device_files": [], "driver__kernel_module_version": None}
    assert quiet("gpu.unusable", change("x86_rtx4090", **wsl)).state == "ok"
    cpu = {"torch__cuda": None, "torch__version": "2.13.0+cpu", **wsl}
    assert one("torch.cpu_build", change("x86_rtx4090", **cpu)).severity == "error"


# --- gpu, driver, torch


def test_capability_warning_is_not_harmless_where_nothing_was_computed() -> None:
    facts = change("gb10_capability_warning", torch__error="CUDA error: no kernel image", **UNUSABLE)
    assert quiet("gpu.capability_warning", facts).state == "not applicable"
    assert one("gpu.unusable", facts).severity == "error"


def test_capability_warning_ignores_other_warnings() -> None:
    facts = change("gb10_healthy", torch__warnings=["pynvml is deprecated"])
    assert quiet("gpu.capability_warning", facts).state == "ok"


@pytest.mark.parametrize(("value", "state"), [(101375, "found"), (101376, "ok"), (232448, "ok"), (None, "not read")])
def test_shared_memory_bound(value: int | None, state: str) -> None:
    facts = change("gb10_healthy", gpus__0__shared_memory_per_block_optin=value)
    assert evaluate("gpu.shared_memory", facts).state == state


def test_power_cap_alone_is_no_slowdown() -> None:
    assert (
        quiet("gpu.throttled", change("gb10_healthy", gpus__0__throttle_reasons=["software power cap"])).state == "ok"
    )
    unread = change("gb10_healthy", driver__nvml_errors={"clock_reasons": "Not Supported"})
    assert quiet("gpu.throttled", unread).state == "not read"


def test_mismatch_by_versions() -> None:
    facts = change("gb10_healthy", driver__kernel_module_version="580.82.09")
    assert one("driver.mismatch", facts).evidence == "kernel module 580.82.09, library 580.95.05"
    assert quiet("driver.mismatch", change("gb10_healthy", driver__version=None)).state == "not applicable"


def test_cpu_build_of_another_maker() -> None:
    facts = change("gb10_healthy", torch__version="2.13.0+rocm7.0", torch__cuda=None, **UNUSABLE)
    assert "another maker" in one("torch.cpu_build", facts).evidence


# --- triton


def test_ptxas_failure_elsewhere_is_a_warning() -> None:
    old = load(FOLDER / "gb10_triton35.json").triton.model_dump()
    assert one("triton.ptxas", change("x86_laptop", triton=old)).severity == "warning"
    assert one("triton.ptxas", change("x86_rtx4090", triton=old)).severity == "warning"
    assert one("triton.ptxas", change("gb10_healthy", triton=old)).severity == "error"


def test_ptxas_fix_names_the_live_variable_and_a_ptxas_that_knows() -> None:
    facts = load(FOLDER / "gb10_triton35.json")
    assert one("triton.ptxas", facts).fix == "export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas"
    alone = facts.triton.model_dump() | {"ptxas": [facts.triton.ptxas[0].model_dump()]}
    assert "triton>=3.6" in one("triton.ptxas", change("gb10_healthy", triton=alone)).fix


def test_ptxas_unknown_is_not_judged() -> None:
    facts = load(FOLDER / "gb10_healthy.json")
    live = next(p for p in facts.triton.ptxas if p.path == facts.triton.live_ptxas)
    live.knows_sm_121a = None
    assert quiet("triton.ptxas", facts).state == "not read"
    facts.triton.live_ptxas = "/elsewhere/ptxas"
    assert quiet("triton.ptxas", facts).state == "not read"


def test_triton_absent_or_broken() -> None:
    facts = change("gb10_healthy", triton={}, packages={"torch": "2.14.1"})
    assert quiet("triton.ptxas", facts).lacks == "not-installed"
    broken = change("gb10_healthy", triton={"error": "ImportError: x"})
    assert quiet("triton.ptxas", broken).state == quiet("triton.variable", broken).state == "not read"


def test_stale_variable_matters_where_the_live_ptxas_fails() -> None:
    facts = load(FOLDER / "gb10_stale_variable.json")
    assert one("triton.variable", facts).fix == "unset TRITON_PTXAS_PATH"
    assert "Harmless" in one("triton.variable", facts).evidence
    live = next(p for p in facts.triton.ptxas if p.path == facts.triton.live_ptxas)
    live.knows_sm_121a = False
    found = one("triton.variable", facts)
    assert found.severity == "warning"
    assert found.fix == "export TRITON_PTXAS_BLACKWELL_PATH=/usr/local/cuda/bin/ptxas"


def test_live_variable_that_works_and_that_does_not() -> None:
    name = "TRITON_PTXAS_BLACKWELL_PATH"
    facts = load(FOLDER / "gb10_healthy.json")
    entry = facts.triton.ptxas[2].model_copy(update={"source": name})
    facts.triton.variables = {name: entry.path}
    works = facts.model_copy(deep=True)
    works.triton.ptxas.append(entry)
    works.triton.live_ptxas = entry.path
    assert "takes effect" in quiet("triton.variable", works).seen
    facts.triton.variables = {name: "/nowhere/ptxas"}
    facts.triton.ptxas.append(
        entry.model_copy(update={"path": "/nowhere/ptxas", "version": None, "error": "/nowhere/ptxas is not installed"})
    )
    found = one("triton.variable", facts)
    assert found.severity == "warning" and "fell back" in found.evidence


# --- python


def test_missing_headers_without_a_gpu_are_a_warning() -> None:
    found = one("python.headers", change("x86_laptop", python__headers=None))
    assert found.severity == "warning" and found.fix == "sudo apt install python3.12-dev"
    assert one("python.compiler", change("x86_laptop", compiler={"searched": True})).severity == "warning"
    assert quiet("python.compiler", change("x86_laptop", compiler={})).state == "not read"


def test_externally_managed_base_of_a_virtual_environment_is_fine() -> None:
    facts = change("gb10_healthy", python__externally_managed=True, python__virtual_environment=True)
    assert quiet("python.externally_managed", facts).state == "ok"


def test_long_list_of_conflicts_is_cut() -> None:
    found = one(
        "python.requirements", change("gb10_healthy", python__requirement_conflicts=[f"p{i}" for i in range(9)])
    )
    assert "p4" in found.evidence and "p5" not in found.evidence and "4 more" in found.evidence


# --- memory


def test_nvml_memory_error_with_own_memory_is_a_finding_of_another_kind() -> None:
    found = one("memory.nvml", change("x86_rtx4090", driver__nvml_errors={"memory": "Not Supported"}))
    assert "memory of its own" in found.evidence and found.fix
    unknown = change("x86_rtx4090", gpus__0__integrated=None, driver__nvml_errors={"memory": "Not Supported"})
    assert quiet("memory.nvml", unknown).state == "not read"


@pytest.mark.parametrize(("gap", "state"), [(9.9, "ok"), (10.1, "found")])
def test_page_cache_gap(gap: float, state: str) -> None:
    facts = change("gb10_healthy", memory__available_gib=100.0, memory__cuda_free_gib=100.0 - gap)
    assert evaluate("memory.page_cache", facts).state == state


def test_page_cache_on_a_discrete_gpu_means_nothing() -> None:
    facts = change("x86_rtx4090", memory__available_gib=60.0, memory__cuda_free_gib=1.0)
    assert quiet("memory.page_cache", facts).lacks == "no-unified-memory"


def test_memory_held_by_a_known_process_is_no_leak() -> None:
    processes = [{"pid": 1, "name": "python", "memory_gib": 70.0}]
    assert "python 1" in quiet("memory.held", change("gb10_memory_held", gpu_processes=processes)).seen


def test_memory_held_is_not_judged_without_sizes_or_processes() -> None:
    unknown = [{"pid": 1, "name": "python", "memory_gib": None}]
    assert quiet("memory.held", change("gb10_memory_held", gpu_processes=unknown)).state == "not read"
    assert quiet("memory.held", change("gb10_memory_held", gpu_processes=None)).state == "not read"


def test_memory_used_by_ordinary_processes_is_no_leak() -> None:
    facts = change("gb10_healthy", memory__available_gib=30.0, memory__anonymous_gib=85.0)
    assert quiet("memory.held", facts).state == "ok", "AnonPages has owners: see memory.floor for too little"


def test_memory_held_in_a_container_may_be_a_neighbour() -> None:
    found = one("memory.held", change("gb10_memory_held", gpu_processes=[], os__in_container=True))
    assert "outside this container" in found.cause and "no GPU process is listed" in found.evidence


def test_memory_held_on_a_discrete_gpu() -> None:
    facts = change("x86_rtx4090", memory__cuda_free_gib=8.0, gpu_processes=[])
    assert "15.5 of 23.5 GiB of the GPU" in one("memory.held", facts).evidence


def test_small_driver_share_is_normal_on_a_small_machine() -> None:
    assert quiet("memory.held", change("n1x_healthy", memory__unaccounted_gib=5.9)).state == "ok"
    assert (
        one("memory.held", change("n1x_healthy", memory__unaccounted_gib=6.5, gpu_processes=[])).severity == "warning"
    )


@pytest.mark.parametrize(("available", "state"), [(2.9, "ok"), (1.9, "found")])
def test_floor_scales_with_the_machine(available: float, state: str) -> None:
    facts = change("x86_laptop", memory__total_gib=16.0, memory__available_gib=available)
    assert evaluate("memory.floor", facts).state == state


@pytest.mark.parametrize("value", ["expandable_segments:False", "max_split_size_mb:512", ""])
def test_allocator_setting_off(value: str) -> None:
    assert quiet("memory.allocator", change("gb10_healthy", env={"PYTORCH_ALLOC_CONF": value})).state == "ok"


def test_allocator_setting_among_others() -> None:
    value = "max_split_size_mb:512, Expandable_Segments: True"
    assert (
        one("memory.allocator", change("gb10_healthy", env={"PYTORCH_ALLOC_CONF": value})).fix
        == "unset PYTORCH_ALLOC_CONF"
    )


# --- container


@pytest.mark.parametrize(
    ("error", "in_container", "severity", "fix"),
    [
        ("Cannot connect to the Docker daemon at unix:///x", False, "error", "sudo systemctl enable --now docker"),
        ("Cannot connect to the Docker daemon at unix:///x", True, "warning", "sparkproof doctor"),
        ("no answer within 6 s", False, "error", "docker info"),
    ],
)
def test_engine_that_does_not_answer(error: str, in_container: bool, severity: str, fix: str) -> None:
    changes = {"container__usable": False, "container__error": error, "os__in_container": in_container}
    found = one("container.access", change("gb10_healthy", **changes))
    assert found.severity == severity and found.fix.startswith(fix)
    assert (
        one("container.access", change("x86_laptop", container={"engine": "docker"}, **changes)).severity == "warning"
    )


def test_no_engine_is_no_failure() -> None:
    facts = change("gb10_healthy", container={})
    for check_id in ("container.access", "container.gpu_runtime"):
        assert quiet(check_id, facts).lacks == "no-container-engine"


def test_engine_that_was_not_read_is_not_absent() -> None:
    facts = change("gb10_healthy", container={}, errors={"container": "OSError: x"})
    assert quiet("container.access", facts).state == "not read"


def test_runtime_fix_installs_the_toolkit_first() -> None:
    facts = change("gb10_no_nvidia_runtime", container__nvidia_ctk=None)
    assert one("container.gpu_runtime", facts).fix.startswith("sudo apt install nvidia-container-toolkit && ")
    podman = change("gb10_no_nvidia_runtime", container__engine="podman")
    assert "cdi generate" in one("container.gpu_runtime", podman).fix


def test_full_shm_takes_gpu_memory_only_on_a_shared_pool() -> None:
    assert "20.0 GiB" in one("container.shm", change("gb10_healthy", shm__used_gib=20.0)).evidence
    assert quiet("container.shm", change("x86_rtx4090", shm__used_gib=20.0)).state == "ok"


def test_small_shm_on_a_host_is_remounted() -> None:
    assert "remount" in one("container.shm", change("x86_laptop", shm__size_gib=0.5)).fix


def test_unlimited_memlock() -> None:
    facts = change("gb10_small_shm", limits__memlock_bytes=-1, limits__stack_bytes=None)
    assert quiet("container.limits", facts).seen == "memlock is unlimited, stack is unknown"


# --- bitsandbytes and downloads


def test_repack_is_for_information_beside_a_gpu() -> None:
    assert one("bitsandbytes.avx512_repack", change("x86_rtx4090", cpu__avx512_bf16=True)).severity == "info"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"bitsandbytes__repacks_on_avx512_bf16": False}, "ok"),
        ({"cpu__avx512_bf16": None}, "not read"),
        ({"bitsandbytes": {}}, "not applicable"),
        ({"arch": "aarch64"}, "not applicable"),
    ],
)
def test_repack_elsewhere(changes: dict[str, Any], state: str) -> None:
    assert quiet("bitsandbytes.avx512_repack", change("x86_avx512_bf16", **changes)).state == state


@pytest.mark.parametrize(
    ("libraries", "state"),
    [
        (["cpu", "cuda130"], "ok"),
        (["cpu", "cuda132"], "ok"),
        (["cpu", "cuda128"], "found"),
        (["cpu"], "found"),
        ([], "not read"),
    ],
)
def test_library_of_the_same_major_version(libraries: list[str], state: str) -> None:
    assert (
        evaluate("bitsandbytes.cuda_library", change("gb10_healthy", bitsandbytes__libraries=libraries)).state == state
    )


def test_forced_library_that_is_not_shipped() -> None:
    found = one("bitsandbytes.cuda_library", change("gb10_healthy", env={"BNB_CUDA_VERSION": "131"}))
    assert found.fix == "unset BNB_CUDA_VERSION"


def test_hf_transfer_by_version_and_presence() -> None:
    env = {"HF_HUB_ENABLE_HF_TRANSFER": "true"}
    assert one("downloads.hf_transfer", change("gb10_healthy", env=env)).severity == "info", "1.x ignores the variable"
    packages = {"huggingface-hub": "0.36.0", "hf-transfer": "0.1.9"}
    assert quiet("downloads.hf_transfer", change("gb10_healthy", env=env, packages=packages)).state == "ok"
    off = change("gb10_mixed_packages", env={"HF_HUB_ENABLE_HF_TRANSFER": "0"})
    assert quiet("downloads.hf_transfer", off).state == "ok"
