"""Every check against the recorded facts: fires where its failure is, and is quiet everywhere else.

The table is complete: each file is judged by all checks, so a check that began to fire on a healthy machine, or on
another failure's facts, fails here.
"""

from __future__ import annotations

import functools
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
    "gb10_bad_kernel": {("driver.known_bad", "warning")},
    "gb10_compile_differs": {("triton.compile", "error"), ("triton.fp4", "warning")},
    "gb10_crashed": {
        ("driver.kernel_log", "warning"),
        ("driver.known_bad", "warning"),
        ("memory.swap", "warning"),
        ("memory.total", "warning"),
        ("power.crashes", "warning"),
    },
    "gb10_cuda12_wheels": {
        ("build.cmake", "warning"),
        ("build.headers", "warning"),
        ("build.jobs", "warning"),
        ("build.toolkit", "warning"),
        ("wheels.cuda", "error"),
        ("wheels.machine", "error"),
    },
    "gb10_flex_too_large": {("attention.flex", "warning")},
    "gb10_four_bit_skew": {("bitsandbytes.round_trip", "error")},
    "gb10_images": {
        ("container.image_architecture", "warning"),
        ("container.stale_image", "warning"),
        ("export.llama_cpp", "warning"),
        ("export.ollama", "warning"),
        ("wheels.vllm", "warning"),
    },
    "gb10_low_power": {("power.canaries", "warning"), ("power.clock", "error")},
    "gb10_models": {
        ("downloads.token", "warning"),
        ("downloads.whole", "error"),
        ("downloads.whole", "warning"),
        ("models.attention_factor", "warning"),
        ("models.fast_path", "warning"),
        ("models.kernel_build", "warning"),
        ("models.unknown_type", "warning"),
    },
    "gb10_ngc_replaced": {
        ("python.torchao", "error"),
        ("torch.cudnn", "error"),
        ("torch.replaced", "warning"),
        ("torch.vision", "error"),
    },
    "gb10_old_script": {("playbook.arguments", "error"), ("python.lock", "warning"), ("python.venv", "warning")},
    "gb10_playbook_as_found": {("playbook.outputs", "warning"), ("playbook.web_page", "error")},
    "gb10_shared_memory_accepted": {("gpu.shared_memory_limit", "warning")},
    "gb10_slow_gemv": {("power.canaries", "warning")},
    "gb10_two_sparks": set(),
    "gb10_two_sparks_down": {("cluster.interface", "error"), ("cluster.link", "error")},
    "gb10_two_sparks_drift": {("cluster.gid_index", "warning"), ("cluster.mtu", "warning")},
    "gb10_unsloth_old": {
        ("unsloth.attention", "warning"),
        ("unsloth.fast_inference", "info"),
        ("unsloth.imports", "error"),
        ("unsloth.load", "warning"),
        ("unsloth.offload", "warning"),
        ("wheels.missing", "warning"),
    },
    "gb10_wrong_attention": {("attention.backends", "warning"), ("attention.extensions", "error")},
    "x86_slow_card": {("power.canaries", "warning"), ("power.clock", "warning")},
    "x86_t4": {("gpu.shared_memory", "warning")},
    "x86_avx512_bf16": {("bitsandbytes.avx512_repack", "warning")},
}
# words that the evidence must hold: what was seen, not only that something was
EVIDENCE = {
    "gpu.unusable": ["no /dev/nvidia*", "no answer within 40 s"],
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
    "gpu.shared_memory_limit": ["131072 of 101376 bytes"],
    "driver.known_bad": ["6.17.0-1008", "590.44.01", "about 102 GiB"],
    "driver.kernel_log": ["37 lines with NV_ERR_NO_MEMORY"],
    "torch.vision": ["torchvision::nms does not exist"],
    "torch.replaced": ["2.10.0a0", "/etc/pip/constraint.txt"],
    "torch.cudnn": ["(9, 20, 0)", "LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu"],
    "triton.compile": ["the cache gave other code than the compiler"],
    "triton.fp4": ["sm_121,"],
    "attention.backends": ["efficient forward in fp32 with heads of 64 is off by 1"],
    "attention.flex": ["Required: 114688 Hardware limit: 101376", "backward"],
    "attention.extensions": ["flash-attn 2.8.3: ImportError: libcudart.so.12"],
    "bitsandbytes.round_trip": ["is a Parameter without compress_statistics"],
    "memory.total": ["102.3 GiB", "115 to 125"],
    "memory.swap": ["12.9 of 16.0 GiB"],
    "power.clock": ["611 of 3003 MHz", "22 W", "reasons: none given", "45%"],
    "power.canaries": ["GEMV is at 37% of the copy", "GEMM 15 TFLOP/s"],
    "power.crashes": ["2 in the last 30 days, on 2026-08-30"],
    "python.venv": ["/usr/bin/python3 has no ensurepip"],
    "python.torchao": ["torchao 0.13.0+git", "0.16.0 or newer"],
    "python.lock": ["1 of 31: transformers: 5.17.0 for 4.56.2"],
    "wheels.cuda": ["flash_attn_2_cuda.so needs libcudart.so.12", "CUDA 13.0"],
    "wheels.machine": ["selective_scan_cuda.so is for x86_64; this is aarch64"],
    "wheels.missing": ["needs torchcodec==0.10.0"],
    "wheels.vllm": ["vllm 0.23.0 has no library that needs CUDA"],
    "build.jobs": ["MAX_JOBS=20; 112 GiB available / 6 GiB a job = 18 jobs"],
    "build.headers": ["lacks nvtx3/nvToolsExt.h, cuda_profiler_api.h"],
    "build.cmake": ["CMake 3.31.6"],
    "build.toolkit": ["the toolkit is CUDA 12.9.86", "is for 13.0"],
    "unsloth.imports": ["No package metadata was found for vllm"],
    "unsloth.fast_inference": ["unsloth 2026.1.4 has the switch"],
    "unsloth.attention": ["flash-attn 2.7.4.post1"],
    "unsloth.offload": ["unsloth_zoo 2026.1.4 does not ask"],
    "unsloth.load": ["UNSLOTH_DISABLE_UMA_CLONE_LOAD=1"],
    "playbook.web_page": ["/workspace/test_unsloth.py begins as HTML does"],
    "playbook.arguments": ["max_seq_length to SFTConfig of trl 0.26.1"],
    "playbook.outputs": ["working folder (/workspace)", "compiled kernels"],
    "models.attention_factor": ["unsloth/Phi-3.5-mini-instruct: rope_scaling.attention_factor is 32"],
    "models.unknown_type": ["Qwen/Qwen3.5-35B-A3B (qwen3_5_moe)"],
    "models.fast_path": ["wants flash-linear-attention, causal-conv1d"],
    "models.kernel_build": ["torch210-cxx11-cu130-x86_64-linux", "torch214 on aarch64"],
    "downloads.whole": ["model-00002-of-00004.safetensors", "openai/gpt-oss-20b"],
    "downloads.token": ["the hub does not know it"],
    "container.image_architecture": ["workbench-llama2:latest is for amd64; this is arm64"],
    "container.stale_image": ["unsloth/unsloth:dgxspark-latest of 2026-01-19"],
    "export.llama_cpp": ["llama-quantize lists no CUDA device"],
    "export.ollama": ["OLLAMA_LLM_LIBRARY=cuda"],
    "cluster.link": ["rocep1s0f0 (enp1s0f0np0) down", "NCCL_SOCKET_IFNAME=enp1s0f2np2"],
    "cluster.mtu": ["enp1s0f1np1 1500", "enP2p1s0f1np1 9000"],
    "cluster.gid_index": ["NCCL_IB_GID_INDEX='3' is read as 3", "rocep1s0f1 4 (192.168.177.11)"],
    "cluster.interface": ["enp1s0f2np2: there is no such interface", "mlx5_0: there is no such device"],
}
HEALTHY = ["gb10_healthy", "gb10_two_sparks", "n1x_healthy", "x86_rtx4090", "x86_laptop"]


@functools.cache
def facts_of(name: str) -> Facts:
    return load(FOLDER / f"{name}.json")


@functools.cache
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
    aside = {o.check: o.seen for o in outcomes_of(name).values() if not o.judged}
    optional = {
        "bitsandbytes.avx512_repack": "a feature of x86_64",
        "container.limits": "not in a container",
        "playbook.outputs": "not in a container",
        "playbook.arguments": "makes no SFTConfig",
        "torch.vision": "not installed",
        "torch.replaced": "no pip constraint",
        "attention.extensions": "is installed",
        "models.fast_path": "no model with linear attention",
        "models.kernel_build": "'kernels' is not installed",
        "wheels.vllm": "not installed",
        "export.llama_cpp": "not installed",
        "export.ollama": "not installed",
    }
    optional |= {c: "Unsloth is not installed" for c in CATALOGUE if c.startswith("unsloth.")}
    optional |= {c: "one machine by itself" for c in CATALOGUE if c.startswith("cluster.")}
    if name == "n1x_healthy":
        optional["memory.total"] = "is not known"
    assert aside.keys() == optional.keys()
    for check_id, words in optional.items():
        assert words in aside[check_id]


def test_a_pair_of_sparks_is_judged_as_one() -> None:
    assert all(o.state == "ok" for c, o in outcomes_of("gb10_two_sparks").items() if c.startswith("cluster."))


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
