"""The branches of checks that judge what is installed: wheels, pins, builds, models, images, servers, history."""

from __future__ import annotations

from typing import Any

import pytest
from sparkproof.checks.registry import evaluate
from test_checks_logic import change, one, quiet

# --- wheels


def library(*needs: str, package: str = "thing") -> dict[str, Any]:
    return {"package": package, "file": f"{package}/x.so", "needs": list(needs)}


def test_cuda_12_that_can_be_loaded_is_a_warning() -> None:
    facts = change("gb10_healthy", wheels__cuda=[library("libcudart.so.12")], wheels__cuda_majors_present=[12, 13])
    assert one("wheels.cuda", facts).severity == "warning"
    facts = change("gb10_healthy", wheels__cuda=[library("libcudart.so.12")])
    assert one("wheels.cuda", facts).severity == "error"


def test_the_fix_is_one_for_each_package() -> None:
    found = [library("libcudart.so.12", package="flash-attn"), library("libcudart.so.12", package="thing")]
    fix = one("wheels.cuda", change("gb10_healthy", wheels__cuda=found)).fix
    assert fix.startswith("pip uninstall flash-attn && pip install --force-reinstall --no-deps thing --index-url")


def test_cuda_12_beside_a_torch_for_cuda_12_is_right() -> None:
    facts = change("gb10_healthy", wheels__cuda=[library("libcudart.so.12")], torch__cuda="12.8", wheels__loaded=[])
    assert quiet("wheels.cuda", facts).state == "ok"


def test_libraries_that_keep_their_own_numbers_do_not_count() -> None:
    """libcufft and libcusparse have numbers that are not CUDA's."""
    facts = change("gb10_healthy", wheels__cuda=[library("libcudart.so.13", "libcusparse.so.12", "libcufft.so.12")])
    assert quiet("wheels.cuda", facts).state == "ok"


def test_what_torch_loaded_counts_too() -> None:
    facts = change(
        "gb10_healthy", wheels__loaded=["/opt/x/libcudart.so.12", "/opt/x/libcudnn.so.9", "/opt/libcuda.so.1"]
    )
    found = one("wheels.cuda", facts)
    assert "loaded /opt/x/libcudart.so.12" in found.evidence and "libcudnn" not in found.evidence
    assert found.fix == "unset LD_LIBRARY_PATH"


def test_a_long_list_is_cut() -> None:
    foreign = [{"package": f"p{i}", "file": f"p{i}/x.so", "machine": "x86_64"} for i in range(9)]
    found = one("wheels.machine", change("gb10_healthy", wheels__foreign=foreign))
    assert "and 5 more" in found.evidence and "p8" in found.fix


def test_an_unread_scan_is_not_judged() -> None:
    facts = change("gb10_healthy", wheels={})
    for check_id in ("wheels.cuda", "wheels.machine"):
        assert quiet(check_id, facts).state == "not read"


def test_missing_packages_that_have_a_wheel_are_another_matter() -> None:
    facts = change("gb10_healthy", pins__missing=["a needs requests>=2", "b needs xformers"])
    found = one("wheels.missing", facts)
    assert found.evidence.startswith("b needs xformers") and "not needed" in found.fix
    assert quiet("wheels.missing", change("x86_rtx4090", pins__missing=["b needs xformers"])).state == "not applicable"


def test_vllm_beside_a_trainer_is_for_information() -> None:
    built = {"wheels__cuda": [library("libcudart.so.13", package="vllm")]}
    facts = change("gb10_healthy", packages={"vllm": "0.24.0", "trl": "1.8.0"}, **built)
    assert one("wheels.vllm", facts).severity == "info"
    assert quiet("wheels.vllm", change("gb10_healthy", packages={"vllm": "0.24.0"}, **built)).state == "ok"


# --- python and torch


@pytest.mark.parametrize(
    ("have", "state"), [("0.15.9", "found"), ("0.16.0", "ok"), ("0.17.0+git", "ok"), ("unknown", "not read")]
)
def test_torchao_by_peft_s_own_number(have: str, state: str) -> None:
    facts = change("gb10_healthy", packages={"peft": "0.19.1", "torchao": have})
    assert evaluate("python.torchao", facts).state == state


def test_conflicts_of_trainers_are_told_first() -> None:
    conflicts = [f"a{i} 1 needs b>2, but 1 is installed" for i in range(6)] + [
        "unsloth 1 needs trl<2, but 3 is installed"
    ]
    found = one("python.requirements", change("gb10_healthy", python__requirement_conflicts=conflicts))
    assert found.evidence.startswith("unsloth 1 needs trl<2") and "2 more" in found.evidence


def test_virtual_environments() -> None:
    outside = {"python__virtual_environment": False}
    assert quiet("python.venv", change("gb10_healthy", **outside)).state == "ok"
    assert quiet("python.venv", change("gb10_healthy", python__ensurepip=None)).state == "not read"
    assert "python3.12-venv" in one("python.venv", change("gb10_healthy", python__ensurepip=False, **outside)).fix


def test_a_constraint_that_is_kept() -> None:
    assert (
        quiet("torch.replaced", change("gb10_healthy", pins__constraint_file="/etc/pip/constraint.txt")).state == "ok"
    )


# --- builds


@pytest.mark.parametrize(("value", "state"), [("18", "ok"), ("19", "found"), ("many", "found"), ("", "ok")])
def test_jobs_by_memory(value: str, state: str) -> None:
    outcome = evaluate("build.jobs", change("gb10_healthy", env={"MAX_JOBS": value}))
    assert outcome.state == state and "112 GiB available / 6 GiB a job = 18 jobs" in outcome.seen


def test_nothing_is_built_without_a_toolkit() -> None:
    facts = change("gb10_cuda12_wheels", cuda={})
    for check_id in ("build.jobs", "build.headers", "build.cmake", "build.toolkit"):
        assert quiet(check_id, facts).state == "not applicable"


@pytest.mark.parametrize(("version", "state"), [("3.31.6", "found"), ("4.0.0", "ok"), ("4.2", "ok"), ("nightly", "ok")])
def test_cmake_on_a_gb10(version: str, state: str) -> None:
    assert evaluate("build.cmake", change("gb10_healthy", pins__cmake=version)).state == state
    assert quiet("build.cmake", change("x86_rtx4090", pins__cmake=version)).state == "not applicable"


# --- models and downloads


def models(*found: dict[str, Any], **more: Any) -> Any:
    cache = {"path": "/c", "models": [{"repository": "o/m", **m} for m in found], **more}
    return change("gb10_healthy", hub_cache=cache, packages__kernels="0.11")


@pytest.mark.parametrize(("factor", "state"), [(1.19, "ok"), (4.0, "ok"), (4.1, "found"), (None, "ok")])
def test_attention_factor(factor: float | None, state: str) -> None:
    assert evaluate("models.attention_factor", models({"attention_factor": factor})).state == state


def test_fast_path_of_a_hybrid_with_its_packages() -> None:
    facts = models({"model_type": "qwen3_5_text"})
    assert "flash-linear-attention, causal-conv1d" in one("models.fast_path", facts).evidence
    facts.packages |= {"flash-linear-attention": "0.5", "causal-conv1d": "1.6"}
    assert quiet("models.fast_path", facts).state == "ok"
    facts.gpus = []
    assert quiet("models.fast_path", facts).state == "not applicable"


@pytest.mark.parametrize(
    ("build", "state"),
    [
        ("torch214-cxx11-cu130-aarch64-linux", "ok"),
        ("torch-universal", "ok"),
        ("torch214-cxx11-cu130-x86_64-linux", "found"),
        ("torch21-cxx11-cu130-aarch64-linux", "found"),
    ],
)
def test_kernel_builds(build: str, state: str) -> None:
    assert evaluate("models.kernel_build", models(kernels={"org/k": [build]})).state == state


def test_a_partial_download_of_a_damaged_model_is_told_once() -> None:
    facts = models({"truncated": ["a.safetensors"]}, incomplete=["o/m", "o/other"])
    found = evaluate("downloads.whole", facts).findings
    assert [f.severity.value for f in found] == ["error", "warning"] and "o/other" in found[1].evidence


@pytest.mark.parametrize(
    ("present", "accepted", "state"),
    [(True, True, "ok"), (True, False, "found"), (True, None, "ok"), (False, None, "ok"), (None, None, "not read")],
)
def test_tokens(present: bool | None, accepted: bool | None, state: str) -> None:
    facts = change("gb10_healthy", hub_token_present=present, hub_cache__token_accepted=accepted)
    assert evaluate("downloads.token", facts).state == state


def test_scripts_and_trl() -> None:
    script = {"path": "t.py", "is_web_page": False, "sft_arguments": ["max_length"], "unknown_arguments": []}
    assert quiet("playbook.arguments", change("gb10_healthy", script=script)).state == "ok"
    without = change("gb10_healthy", script=script | {"unknown_arguments": None})
    assert quiet("playbook.arguments", without).seen == "trl is not installed"
    assert quiet("playbook.web_page", change("gb10_healthy", script={})).state == "not applicable"


# --- containers, servers, history


def images(*found: dict[str, Any], **more: Any) -> Any:
    return change("gb10_healthy", container__images=list(found), **{f"container__{k}": v for k, v in more.items()})


def test_an_emulated_image_runs_and_is_slow() -> None:
    foreign = {"tags": ["a:1"], "architecture": "amd64"}
    assert one("container.image_architecture", images(foreign, emulates=["x86_64"])).severity == "info"
    assert one("container.image_architecture", images(foreign, emulates=["riscv64"])).severity == "warning"
    assert one("container.image_architecture", images(foreign, emulates=None)).severity == "warning"
    both = images(foreign, {"tags": [], "digest": "sha256:1", "architecture": "ppc64le"}, emulates=["x86_64"])
    assert one("container.image_architecture", both).severity == "warning"


def test_images_of_an_engine_that_does_not_answer() -> None:
    assert quiet("container.stale_image", images(usable=False)).seen == "explained by container.access"
    assert quiet("container.stale_image", change("gb10_healthy", container__images=None)).state == "not read"


def test_ollama_that_chose_the_cpu() -> None:
    on_cpu = {"path": "/usr/bin/ollama", "running": ["q 6 GB 100% CPU"], "on_cpu": ["q"]}
    found = one("export.ollama", change("gb10_healthy", ollama=on_cpu))
    assert found.severity == "warning" and "q at 100% CPU" in found.evidence
    fine = {"path": "/usr/bin/ollama", "library": "cuda_v13"}
    assert quiet("export.ollama", change("gb10_healthy", ollama=fine)).state == "ok"
    assert quiet("export.ollama", change("x86_laptop", ollama=on_cpu)).state == "not applicable"


def test_llama_cpp() -> None:
    assert quiet("export.llama_cpp", change("gb10_healthy", llama_cpp={"path": "/x", "cuda": True})).state == "ok"
    assert quiet("export.llama_cpp", change("gb10_healthy", llama_cpp={"path": "/x"})).state == "not read"


@pytest.mark.parametrize(
    ("kernel", "state"),
    [
        ("6.17.0-1008-nvidia", "found"),
        ("6.17.0-10081-nvidia", "ok"),
        ("6.17.0-1014-nvidia", "ok"),
        ("6.17.0-1008", "found"),
    ],
)
def test_kernels_with_reports(kernel: str, state: str) -> None:
    assert evaluate("driver.known_bad", change("gb10_healthy", os__kernel=kernel)).state == state
    assert quiet("driver.known_bad", change("x86_rtx4090", os__kernel=kernel)).state == "ok", "reports are of Sparks"


def test_the_kernel_log() -> None:
    xid = one("driver.kernel_log", change("gb10_healthy", history__xids=["Xid 79"]))
    assert "Xid 79" in xid.evidence and "Xid errors" in xid.cause
    hidden = change("gb10_healthy", history__memory_errors=None)
    assert quiet("driver.kernel_log", hidden).state == "not read"
    hidden.os.in_container = True
    assert quiet("driver.kernel_log", hidden).state == "not applicable"


@pytest.mark.parametrize(("total", "state"), [(119.7, "ok"), (102.3, "found"), (61.0, "ok"), (None, "not read")])
def test_memory_of_a_spark_and_of_its_smaller_variant(total: float | None, state: str) -> None:
    assert evaluate("memory.total", change("gb10_healthy", memory__total_gib=total)).state == state


@pytest.mark.parametrize(("free", "state"), [(12.0, "ok"), (11.9, "found"), (None, "not read")])
def test_swap(free: float | None, state: str) -> None:
    assert evaluate("memory.swap", change("gb10_healthy", memory__swap_free_gib=free)).state == state


def test_outputs_that_stay_and_that_go() -> None:
    places = [{"name": "working folder", "path": "/workspace", "in_image": False}]
    inside = {"os__in_container": True, "places": places}
    assert "working folder" in quiet("playbook.outputs", change("gb10_healthy", **inside)).seen
    assert quiet("playbook.outputs", change("gb10_healthy", **inside | {"places": None})).state == "not read"
