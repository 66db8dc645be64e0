"""What is read of installed files: ELF headers, the hub's cache, pins, Unsloth, the script, llama.cpp, Ollama."""

from __future__ import annotations

import datetime
import json
import os
import platform
import struct
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparkproof.facts import companions, history, hub, pins, wheels
from sparkproof.facts.elf import Elf, read_elf
from sparkproof.facts.host import Ran
from test_facts_probes import FakeHost, put

# --- ELF


def elf(path: Path, machine: int, needed: list[str]) -> Path:
    """A file with just the headers that are read: one PT_LOAD over all of it, one PT_DYNAMIC."""
    names = b"\0" + b"".join(n.encode() + b"\0" for n in needed)
    offsets, at = [], 1
    for n in needed:
        offsets.append(at)
        at += len(n) + 1
    table, dynamic = 0x200, 0x400
    base = 0x10000  # addresses differ from places in the file
    entries = [(5, base + table), *((1, o) for o in offsets), (0, 0)]
    body = bytearray(0x800)
    body[:16] = b"\x7fELF\x02\x01\x01" + bytes(9)
    struct.pack_into("<HHIQQQIHHHHHH", body, 16, 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    struct.pack_into("<IIQQQQQQ", body, 64, 1, 5, 0, base, base, 0x800, 0x800, 0x1000)
    struct.pack_into("<IIQQQQQQ", body, 120, 2, 6, dynamic, base + dynamic, 0, 16 * len(entries), 0, 8)
    body[table : table + len(names)] = names
    for i, (tag, value) in enumerate(entries):
        struct.pack_into("<qQ", body, dynamic + 16 * i, tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(body))
    return path


def test_headers_of_a_made_library(tmp_path: Path) -> None:
    path = elf(tmp_path / "x.so", 183, ["libcudart.so.12", "libc.so.6"])
    assert read_elf(path) == Elf("aarch64", ("libcudart.so.12", "libc.so.6"))
    assert read_elf(elf(tmp_path / "y.so", 62, [])) == Elf("x86_64", ())
    assert read_elf(elf(tmp_path / "z.so", 999, [])) == Elf("ELF machine 999", ())


def test_headers_of_the_real_python() -> None:
    found = read_elf(Path(sys.executable).resolve())
    assert found is not None and found.machine == platform.machine()
    assert any(n.startswith("libc.") for n in found.needed)


def test_what_is_no_library_is_none(tmp_path: Path) -> None:
    whole = elf(tmp_path / "whole.so", 183, ["libc.so.6"]).read_bytes()
    for name, content in (("empty", b""), ("text", b"not an ELF file at all"), ("32", b"\x7fELF\x01\x01" + bytes(60))):
        path = tmp_path / name
        path.write_bytes(content)
        assert read_elf(path) is None
    torn = tmp_path / "torn.so"
    torn.write_bytes(whole[:100])
    assert read_elf(torn) is None
    assert read_elf(tmp_path / "absent.so") is None


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_headers_are_no_harm(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(elf(tmp_path / "x.so", 183, ["libcudart.so.12"]).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from([*range(18, 64), *range(64, 176), *range(0x400, 0x440)]))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.so"
    path.write_bytes(bytes(content[: data.draw(st.sampled_from([len(content), 0x410, 100, 20]))]))
    found = read_elf(path)
    assert found is None or isinstance(found, Elf)


# --- wheels


@pytest.fixture
def aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def test_foreign_code_is_found_and_meant_code_is_not(tmp_path: Path, aarch64: None) -> None:
    site = tmp_path / "site-packages"
    elf(site / "causal_conv1d_cuda.cpython-312-x86_64-linux-gnu.so", 62, [])
    elf(site / "debugpy" / "attach_linux_amd64.so", 62, [])
    elf(site / "numpy" / "core.so", 183, ["libc.so.6"])
    found = wheels.read_wheels(FakeHost(tmp_path), [site])
    assert found.scanned == 3
    assert [(x.file, x.machine) for x in found.foreign] == [
        ("causal_conv1d_cuda.cpython-312-x86_64-linux-gnu.so", "x86_64")
    ]


def test_cuda_libraries_by_package(tmp_path: Path, aarch64: None) -> None:
    site = tmp_path / "site-packages"
    elf(site / "flash_attn" / "a.so", 183, ["libcudart.so.12", "libc.so.6"])
    elf(site / "flash_attn" / "b.so", 183, ["libcudart.so.12"])
    elf(site / "bitsandbytes" / "libbitsandbytes_cuda128.so", 183, ["libcudart.so.12"])
    elf(site / "nvidia" / "cublas" / "lib" / "libcublas.so.12", 183, ["libcublasLt.so.12"])
    elf(site / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12", 183, [])
    elf(site / "torch.libs" / "libthing.so.1", 183, ["libnvrtc.so.13"])
    found = wheels.read_wheels(FakeHost(tmp_path), [site])
    assert [(x.package, x.needs) for x in found.cuda] == [
        ("flash_attn", ["libcudart.so.12"]),
        ("torch", ["libnvrtc.so.13"]),
    ], "those of several versions name theirs, and NVIDIA's own need each other"
    assert found.cuda_majors_present == [12]


def test_a_library_is_named_by_the_distribution_it_came_with(
    tmp_path: Path, aarch64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"flash_attn_2_cuda": ["flash-attn"]}
    monkeypatch.setattr(wheels.importlib.metadata, "packages_distributions", lambda: names)
    site = tmp_path / "site-packages"
    elf(site / "flash_attn_2_cuda.cpython-312-aarch64-linux-gnu.so", 183, ["libcudart.so.12"])
    elf(site / "own_thing.cpython-312-x86_64-linux-gnu.so", 62, [])
    found = wheels.read_wheels(FakeHost(tmp_path), [site])
    assert found.cuda[0].package == "flash-attn"
    assert found.foreign[0].package.startswith("own_thing"), "of no distribution"


def test_the_toolkits_runtime_counts(tmp_path: Path) -> None:
    put(tmp_path, "/usr/local/cuda-13.0/lib64/libcudart.so.13")
    put(tmp_path, "/usr/local/cuda-12.9/targets/sbsa-linux/lib/libcudart.so.12.9.79")
    assert wheels.runtimes(FakeHost(tmp_path), []) == [12, 13]


# --- the hub's cache


def safetensors(path: Path, missing: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((struct.pack("<Q", len(header)) + header + bytes(128))[: -missing or None])


def cached(tmp_path: Path, name: str, config: dict[str, object]) -> Path:
    snapshot = tmp_path / "hub" / name / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return snapshot


def transformers(tmp_path: Path) -> Path:
    put(tmp_path, "/t/models/auto/auto_mappings.py", 'X = [\n("llama", "LlamaConfig"),\n("phi3", "Phi3Config")]')
    return tmp_path / "t"


def read(tmp_path: Path) -> hub.HubCache:
    host = FakeHost(tmp_path, {"HF_HUB_CACHE": str(tmp_path / "hub")})
    return hub.read_hub_cache(host, transformers(tmp_path))


def test_models_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    phi = cached(tmp_path, "models--unsloth--Phi", {"model_type": "phi3", "rope_scaling": {"attention_factor": 32.0}})
    safetensors(phi / "model.safetensors")
    cut = cached(tmp_path, "models--org--Cut", {"model_type": "qwen3_5_moe"})
    safetensors(cut / "model-00001-of-00002.safetensors", missing=1)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    cached(tmp_path, "models--org--Remote", {"model_type": "own", "auto_map": {"AutoConfig": "c.C"}})
    models = {m.repository: m for m in read(tmp_path).models}
    assert models["unsloth/Phi"].attention_factor == 32.0 and models["unsloth/Phi"].known is True
    assert models["unsloth/Phi"].truncated == []
    assert models["org/Cut"].known is False
    assert models["org/Cut"].truncated == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors (missing)",
    ]
    assert models["org/Remote"].known is True, "code of its own"


def test_an_index_alone_is_no_damage(tmp_path: Path) -> None:
    folder = cached(tmp_path, "models--org--Config", {"model_type": "llama"})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}', encoding="utf-8")
    assert read(tmp_path).models[0].truncated == []


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_file_that_is_no_safetensors_is_not_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert not hub.whole(path)


def test_downloads_that_go_on_and_that_ended(tmp_path: Path) -> None:
    old = put(tmp_path, "/hub/models--org--Old/blobs/1.incomplete")
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    put(tmp_path, "/hub/models--org--New/blobs/1.incomplete")
    assert read(tmp_path).incomplete == ["org/Old"]


def test_builds_of_kernels(tmp_path: Path) -> None:
    put(tmp_path, "/hub/models--kernels-community--fa3/snapshots/a/build/torch210-cxx11-cu130-x86_64-linux/k.so")
    found = read(tmp_path)
    assert found.kernels == {"kernels-community/fa3": ["torch210-cxx11-cu130-x86_64-linux"]} and not found.models


def test_no_cache_is_empty_and_has_its_path(tmp_path: Path) -> None:
    found = hub.read_hub_cache(FakeHost(tmp_path, {"HF_HOME": str(tmp_path / "hf")}), None)
    assert found.path == str(tmp_path / "hf" / "hub") and not found.models


def test_known_types_of_the_installed_transformers() -> None:
    folder = companions.package_folder("transformers")
    types = hub.known_types(folder)
    assert types is not None and {"llama", "qwen3", "gemma3"} <= types and "no_such_type" not in types
    assert hub.known_types(None) is None


@pytest.mark.parametrize(
    ("ran", "accepted"),
    [
        (Ran(0, "alice\n"), True),
        (Ran(0, "Not logged in\n"), False),
        (Ran(1, "", "Invalid user token.", "Invalid user token."), False),
        (Ran(1, "", "connection refused", "connection refused"), None),
    ],
)
def test_token_by_whoami(tmp_path: Path, ran: Ran, accepted: bool | None) -> None:
    host = FakeHost(tmp_path, commands={"hf auth whoami": ran}, programs={"hf": "/usr/bin/hf"})
    assert hub.token_accepted(host) is accepted
    assert hub.token_accepted(FakeHost(tmp_path)) is None, "no such command"


# --- pins


def test_pins_that_differ() -> None:
    text = (
        "torch==2.10.0a0+nv \\\n    --hash=sha256:1\n# note\ncolorama==0.4 ; sys_platform == 'win32'\nabsent==1\n-e .\n"
    )
    packages = {"torch": "2.10.0a0+other", "colorama": "0.1"}
    assert pins.differing(text, packages, exact=True) == (1, ["torch: 2.10.0a0+other for 2.10.0a0+nv"])
    assert pins.differing(text, packages) == (1, []), "a local part is the index's business"


def test_constraint_lock_and_tools(tmp_path: Path) -> None:
    put(tmp_path, "/etc/pip/constraint.txt", "torch==2.10.0a0+nv\n")
    put(tmp_path, "/here/requirements/lock.txt", "peft==0.21.2\n")
    nvcc = put(tmp_path, "/usr/local/cuda/bin/nvcc")
    put(tmp_path, "/usr/local/cuda/include/cuda_runtime.h")
    cmake = Ran(0, "cmake version 3.31.6\n\nCMake suite maintained by Kitware\n")
    host = FakeHost(tmp_path, commands={"cmake --version": cmake}, programs={"cmake": "/usr/bin/cmake"})
    found = pins.read_pins(host, {"torch": "2.9.1", "peft": "0.19.0"}, "/usr/local/cuda/bin/nvcc", tmp_path / "here")
    assert nvcc.exists() and found.replaced == ["torch: 2.9.1 for 2.10.0a0+nv"]
    assert found.drifted == ["peft: 0.19.0 for 0.21.2"] and found.locked == 1 and found.cmake == "3.31.6"
    assert found.cuda_headers == {"nvtx3/nvToolsExt.h": False, "cuda_profiler_api.h": False, "cuda_runtime.h": True}
    assert found.missing is not None and any(m.startswith("peft needs ") for m in found.missing)


def test_torchao_minimum_is_what_the_installed_peft_says() -> None:
    assert pins.torchao_minimum() == "0.16.0"


# --- companions


def test_import_of_unsloth_judged() -> None:
    assert companions.judge_import(Ran(0, 'noise\n{"error": null}\n')) == (True, None)
    assert companions.judge_import(Ran(0, '{"error": "ImportError: x"}\n')) == (False, "ImportError: x")
    assert companions.judge_import(Ran(None, "", "", "no answer within 30 s")) == (False, "no answer within 30 s")
    assert companions.judge_import(None) == (None, None)


def test_script_that_is_a_web_page(tmp_path: Path) -> None:
    (tmp_path / "test_unsloth.py").write_text("\n\n<!DOCTYPE html>\n<html>", encoding="utf-8")
    assert companions.read_script(tmp_path).is_web_page is True
    assert companions.read_script(tmp_path / "none").path is None


def test_arguments_that_trl_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import trl\nt = SFTTrainer(args=trl.SFTConfig(max_seq_length=2, output_dir='x', packing=True))\n"
    (tmp_path / "test_unsloth.py").write_text(source, encoding="utf-8")
    put(tmp_path, "/trl/trainer/sft_config.py", "class SFTConfig(A):\n    packing: bool = False\n")
    put(tmp_path, "/transformers/training_args.py", "class A:\n    output_dir: str = ''\n")
    monkeypatch.setattr(companions, "package_folder", lambda name, package=None: tmp_path / name)
    assert companions.read_script(tmp_path).unknown_arguments == ["max_seq_length"]
    monkeypatch.setattr(companions, "package_folder", lambda name, package=None: None)
    assert companions.read_script(tmp_path).unknown_arguments is None, "without trl nothing is known"
    assert companions.sft_arguments("def broken(:") == []


def test_places_in_the_image_and_on_mounts(tmp_path: Path) -> None:
    mounts = (
        "1 0 0:1 / / rw - overlay overlay rw\n"
        "2 1 0:2 / /proc rw - proc proc rw\n"
        "3 1 8:1 /home /root/.cache/huggingface rw - ext4 /dev/nvme0n1p2 rw\n"
    )
    put(tmp_path, "/proc/self/mountinfo", mounts)
    put(tmp_path, "/.dockerenv")
    found = {p.name: p.in_image for p in companions.read_places(FakeHost(tmp_path, {"HOME": "/root"}))}
    assert found["models"] is False and found["compiled kernels"] is True
    outside = FakeHost(tmp_path / "host", {"HOME": "/root"})
    assert {p.in_image for p in companions.read_places(outside)} == {None}, "on a host nothing ends with a container"


def test_llama_cpp_with_and_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = put(tmp_path, "/opt/bin/llama-server")
    found = {"llama-server": str(program)}
    cpu = Ran(0, "Available devices:\n")
    assert (
        companions.read_llama_cpp(FakeHost(tmp_path, {"HOME": str(tmp_path)}, {"list-devices": cpu}, found)).cuda
        is False
    )
    gpu = Ran(0, "Available devices:\n  CUDA0: NVIDIA GB10\n")
    assert (
        companions.read_llama_cpp(FakeHost(tmp_path, {"HOME": str(tmp_path)}, {"list-devices": gpu}, found)).cuda
        is True
    )
    put(tmp_path, "/opt/lib/libggml-cuda.so")
    assert companions.read_llama_cpp(FakeHost(tmp_path, {"HOME": str(tmp_path)}, {}, found)).cuda is True
    assert companions.read_llama_cpp(FakeHost(tmp_path, {"HOME": str(tmp_path)})).path is None


def test_llama_cpp_that_does_not_answer_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {"llama-cli": str(put(tmp_path, "/opt/bin/llama-cli"))}
    hung = Ran(None, "", "", "no answer within 5 s")
    assert companions.read_llama_cpp(FakeHost(tmp_path, {}, {"list-devices": hung}, found)).cuda is None


OLLAMA_PS = (
    "NAME         ID              SIZE      PROCESSOR          CONTEXT    UNTIL\n"
    "qwen3:8b     500a1f067a9f    6.0 GB    100% CPU           4096       4 minutes from now\n"
    "llama3:8b    365c0bd3c000    5.4 GB    25%/75% CPU/GPU    4096       2 minutes from now\n"
)


def test_ollama(tmp_path: Path) -> None:
    service = Ran(0, "Environment=PATH=/usr/bin OLLAMA_LLM_LIBRARY=cuda\n")
    host = FakeHost(
        tmp_path,
        commands={"ollama ps": Ran(0, OLLAMA_PS), "systemctl show": service},
        programs={"ollama": "/usr/bin/ollama", "systemctl": "/usr/bin/systemctl"},
    )
    found = companions.read_ollama(host)
    assert found.on_cpu == ["qwen3:8b"] and found.library == "cuda"
    assert found.running == ["qwen3:8b 6.0 GB 100% CPU", "llama3:8b 5.4 GB 25%/75% CPU/GPU"]
    assert companions.read_ollama(FakeHost(tmp_path)).path is None


# --- history


LAST = """reboot   system boot  6.17.0-1014-nvidia 2026-11-24T08:00:11+00:00   still running
reboot   system boot  6.17.0-1014-nvidia 2026-11-20T22:13:02+00:00 - 2026-11-24T08:00:11+00:00 (3+09:47)
shutdown system down  6.17.0-1014-nvidia 2026-11-20T22:12:40+00:00 - 2026-11-20T22:13:02+00:00  (00:00)
reboot   system boot  6.17.0-1014-nvidia 2026-08-01T08:00:00+00:00 - 2026-11-20T22:12:40+00:00
reboot   system boot  6.17.0-1014-nvidia 2026-07-31T08:00:00+00:00 - 2026-08-01T08:00:00+00:00

wtmp begins 2026-07-31T08:00:00+00:00
"""


def test_boots_that_no_shutdown_came_before() -> None:
    today = datetime.date(2026, 11, 24)
    assert history.crashes(LAST, today) == ["2026-11-24"], "the one in August is too old to count"
    assert history.crashes("", today) == []


def test_kernel_log(tmp_path: Path) -> None:
    lines = (
        "kernel: NVRM: _memdescAllocInternal: Check failed: Out of memory [NV_ERR_NO_MEMORY] (0x00000051)\n"
        "kernel: NVRM: Xid (PCI:000f:01:00): 79, GPU has fallen off the bus\n"
    )
    programs = {"journalctl": "/usr/bin/journalctl"}
    host = FakeHost(tmp_path, commands={"-b -1": Ran(0, lines), "-b 0": Ran(1, "", "")}, programs=programs)
    found = history.read_history(host)
    assert (found.memory_errors, found.xids, found.crashes) == (1, ["Xid 79"], None)
    denied = Ran(1, "", "Hint: You are currently not seeing messages from other users and the system.")
    assert history.read_history(FakeHost(tmp_path, commands={"-k": denied}, programs=programs)).memory_errors is None
    quiet = FakeHost(tmp_path, commands={"-k": Ran(1, "", "")}, programs=programs)
    assert history.read_history(quiet).memory_errors == 0, "no match is an answer"


def test_kernel_log_by_dmesg(tmp_path: Path) -> None:
    host = FakeHost(
        tmp_path, commands={"dmesg": Ran(0, "NVRM: x NV_ERR_NO_MEMORY\nother\n")}, programs={"dmesg": "dmesg"}
    )
    assert history.read_history(host).memory_errors == 1
    denied = FakeHost(
        tmp_path, commands={"dmesg": Ran(1, "", "x", "Operation not permitted")}, programs={"dmesg": "dmesg"}
    )
    assert history.read_history(denied).memory_errors is None


def test_a_program_in_the_working_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "/llama.cpp/build/bin/llama-server")
    monkeypatch.setattr(FakeHost, "run", lambda *a, **k: pytest.fail("it may be anything"))
    found = companions.read_llama_cpp(FakeHost(tmp_path))
    assert found.path and found.path.endswith("llama.cpp/build/bin/llama-server") and found.cuda is None


def test_llama_cpp_whose_backends_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {"llama-quantize": str(put(tmp_path, "/opt/bin/llama-quantize"))}
    put(tmp_path, "/opt/lib/libggml-cpu.so")
    usage = Ran(1, "", "usage: llama-quantize", "usage")
    assert companions.read_llama_cpp(FakeHost(tmp_path, {}, {"list-devices": usage}, found)).cuda is False
