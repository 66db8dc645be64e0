"""Each probe against a stand-in host: what it reads, and what it says where there is nothing to read."""

from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from sparkproof.facts import container, memory, network, nvidia, software, system, torch_probe, triton_probe
from sparkproof.facts.host import Host, Ran

MEMINFO = """MemTotal:       125513728 kB
MemFree:        104857600 kB
MemAvailable:   115343360 kB
Buffers:          1048576 kB
Cached:          10485760 kB
SwapCached:             0 kB
SwapTotal:       16777216 kB
SwapFree:        16777216 kB
AnonPages:        2097152 kB
Shmem:             524288 kB
Slab:             1048576 kB
KernelStack:        16384 kB
PageTables:         32768 kB
Percpu:              8192 kB
HugePages_Total:       0
Hugetlb:          2097152 kB
"""


class FakeHost(Host):
    """A root folder of its own, and commands that answer as told."""

    def __init__(
        self,
        root: Path,
        environ: Mapping[str, str] | None = None,
        commands: Mapping[str, Ran] | None = None,
        programs: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(root, environ or {})
        self.commands = dict(commands or {})
        self.programs = dict(programs or {})

    def which(self, name: str) -> str | None:
        return self.programs.get(name)

    def run(self, argv: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None) -> Ran:
        line = " ".join(argv)
        for part, ran in self.commands.items():
            if part in line:
                return ran
        return Ran(None, error=f"{argv[0]} is not installed")


def put(root: Path, absolute: str, text: str = "") -> Path:
    path = root / absolute.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- host


def test_missing_command_is_an_answer() -> None:
    ran = Host().run(["no-such-command-at-all"], 5)
    assert ran.code is None and ran.error == "no-such-command-at-all is not installed"


def test_command_over_time_is_ended_and_its_output_kept() -> None:
    start = time.monotonic()
    ran = Host().run([sys.executable, "-c", "print('early', flush=True); import time; time.sleep(60)"], 1.5)
    assert time.monotonic() - start < 10
    assert ran.error == "no answer within 1.5 s" and ran.out == "early\n"


def test_failing_command_gives_its_last_line() -> None:
    ran = Host().run([sys.executable, "-c", "import sys; sys.stderr.write('one\\ntwo\\n'); sys.exit(4)"], 20)
    assert (ran.code, ran.error) == (4, "two")


def test_command_output_never_reaches_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    Host().run([sys.executable, "-c", "import sys; print('x'); sys.stderr.write('y')"], 20)
    assert capfd.readouterr() == ("", "")


# --- memory


def test_meminfo_accounts_for_every_owner(tmp_path: Path) -> None:
    put(tmp_path, "/proc/meminfo", MEMINFO)
    m = memory.read_memory(FakeHost(tmp_path))
    assert (m.total_gib, m.available_gib, m.free_gib) == (119.699, 110.0, 100.0)
    owned = 104857600 + 1048576 + 10485760 + 2097152 + 1048576 + 16384 + 32768 + 8192 + 2097152
    assert m.unaccounted_gib == pytest.approx((125513728 - owned) / 2**20, abs=1e-3)
    assert m.huge_pages_gib == 2.0 and m.shared_gib == 0.5


def test_meminfo_in_part_leaves_fields_unread(tmp_path: Path) -> None:
    put(tmp_path, "/proc/meminfo", "MemTotal: 1048576 kB\nnonsense\nMemFree: x kB\n")
    m = memory.read_memory(FakeHost(tmp_path))
    assert m.total_gib == 1.0
    assert m.free_gib is None and m.available_gib is None and m.unaccounted_gib is None


def test_meminfo_absent_raises_for_the_collector(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="meminfo"):
        memory.read_memory(FakeHost(tmp_path))


def test_this_machine_has_no_large_unaccounted_memory() -> None:
    m = memory.read_memory(Host())
    assert m.total_gib is not None and m.unaccounted_gib is not None
    assert 0 <= m.unaccounted_gib < m.total_gib / 2


# --- system


def test_os_release_and_dgx_release(tmp_path: Path) -> None:
    put(tmp_path, "/etc/os-release", 'ID=ubuntu\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n# comment=1\n')
    put(tmp_path, "/etc/dgx-release", 'DGX_SWBUILD_VERSION="7.2.3"\nDGX_OTA_VERSION="7.3.1"\n')
    put(tmp_path, "/sys/class/dmi/id/product_name", "NVIDIA_DGX_Spark\n")
    read = system.read_os(FakeHost(tmp_path))
    assert (read.name, read.version, read.dgx_release) == ("ubuntu", "Ubuntu 24.04.3 LTS", "7.3.1")
    assert read.product == "NVIDIA_DGX_Spark" and read.in_container is False


@pytest.mark.parametrize("mark", ["/.dockerenv", "/run/.containerenv"])
def test_container_marks(tmp_path: Path, mark: str) -> None:
    assert not system.in_container(FakeHost(tmp_path))
    put(tmp_path, mark)
    assert system.in_container(FakeHost(tmp_path))


def test_container_by_control_group_or_variable(tmp_path: Path) -> None:
    assert system.in_container(FakeHost(tmp_path, {"container": "podman"}))
    put(tmp_path, "/proc/1/cgroup", "0::/kubepods/burstable/pod1\n")
    assert system.in_container(FakeHost(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Intel Xeon\nflags\t\t: fpu avx512_bf16 sse\n", True),
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        ("processor\t: 0\n", None),
    ],
)
def test_avx512_bf16_is_read_or_unknown(tmp_path: Path, text: str, expected: bool | None) -> None:
    put(tmp_path, "/proc/cpuinfo", text)
    assert system.read_cpu(FakeHost(tmp_path)).avx512_bf16 is expected


# --- NVIDIA


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build  (dvs)", "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024", "550.54.14"),
        ("GCC version: gcc 13.3.0", None),
        ("", None),
    ],
)
def test_kernel_module_version(line: str, version: str | None) -> None:
    assert nvidia.module_version(line) == version


def test_pci_counts_display_controllers_of_nvidia_alone(tmp_path: Path) -> None:
    for address, vendor, kind in [
        ("000f:01:00.0", "0x10de", "0x030200"),
        ("0000:01:00.1", "0x10de", "0x040300"),  # its audio function
        ("0000:00:02.0", "0x8086", "0x030000"),
    ]:
        put(tmp_path, f"/sys/bus/pci/devices/{address}/vendor", f"{vendor}\n")
        put(tmp_path, f"/sys/bus/pci/devices/{address}/class", f"{kind}\n")
    (tmp_path / "drivers" / "nouveau").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/000f:01:00.0/driver").symlink_to(tmp_path / "drivers" / "nouveau")
    driver = nvidia.read_driver(FakeHost(tmp_path))
    assert driver.pci_devices == ["000f:01:00.0"] and driver.pci_driver == "nouveau"
    assert driver.device_files == [] and driver.kernel_module_version is None


def test_no_sysfs_is_not_no_hardware(tmp_path: Path) -> None:
    assert nvidia.read_driver(FakeHost(tmp_path)).pci_devices is None


def test_denied_device_files_are_the_ones_cuda_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        put(tmp_path, f"/dev/{name}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    driver = nvidia.read_driver(FakeHost(tmp_path))
    assert driver.denied_device_files == ["/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidiactl"]
    assert driver.device_files is not None and len(driver.device_files) == 4


def test_wsl_needs_its_own_library(tmp_path: Path) -> None:
    put(tmp_path, "/dev/dxg")
    assert not nvidia.read_driver(FakeHost(tmp_path)).wsl
    put(tmp_path, "/usr/lib/wsl/lib/libcuda.so.1")
    assert nvidia.read_driver(FakeHost(tmp_path)).wsl


def test_nvml_that_hangs_is_an_error_not_a_crash(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, commands={"nvml_child": Ran(None, error="no answer within 15 s")})
    driver, gpus, processes = nvidia.read_nvml(host)
    assert driver.nvml_errors == {"init": "no answer within 15 s"} and gpus == [] and processes is None


def test_nvcc_from_cuda_home_first(tmp_path: Path) -> None:
    put(tmp_path, "/opt/cuda/bin/nvcc")
    put(tmp_path, "/usr/local/cuda/bin/nvcc")
    said = Ran(0, "Cuda compilation tools, release 13.0, V13.0.88\n")
    host = FakeHost(tmp_path, {"CUDA_HOME": "/opt/cuda"}, {"/opt/cuda/bin/nvcc": said})
    assert nvidia.read_cuda_toolkit(host).model_dump() == {"nvcc": "/opt/cuda/bin/nvcc", "version": "13.0.88"}
    assert nvidia.read_cuda_toolkit(FakeHost(tmp_path / "empty")).nvcc is None


# --- torch and Triton


def test_torch_that_hangs_keeps_what_it_said(tmp_path: Path) -> None:
    lines = (
        '{"stage": "it was imported"}\nsome library printed this\n'
        '{"torch": {"version": "2.14.1+cu130", "cuda": "13.0"}, "stage": "it started CUDA"}\n{"torch": {"cuda_avail'
    )
    host = FakeHost(tmp_path, commands={"torch_child": Ran(-9, lines, error="no answer within 60 s")})
    answer = torch_probe.read_torch(host)
    assert answer.torch.version == "2.14.1+cu130" and answer.torch.cuda_available is None
    assert answer.torch.error == "torch stopped while it started CUDA: no answer within 60 s"


def test_torch_missing_is_said(tmp_path: Path) -> None:
    said = '{"torch": {"error": "import torch: ModuleNotFoundError: No module named \'torch\'"}, "done": true}\n'
    answer = torch_probe.read_torch(FakeHost(tmp_path, commands={"torch_child": Ran(0, said)}))
    assert answer.torch.version is None and "No module named" in (answer.torch.error or "")


def test_triton_is_asked_which_variable_moves_it() -> None:
    triton = triton_probe.read_triton(Host(environ={**os.environ, "TRITON_PTXAS_PATH": "/nowhere/ptxas"}))
    assert triton.version and not triton.error
    assert triton.variables == {"TRITON_PTXAS_PATH": "/nowhere/ptxas"}
    assert triton.live_variable == "TRITON_PTXAS_BLACKWELL_PATH", "true from Triton 3.6 on, which this project needs"
    live = next(p for p in triton.ptxas if p.path == triton.live_ptxas)
    assert live.knows_sm_121a is True
    named = next(p for p in triton.ptxas if p.source == "TRITON_PTXAS_PATH")
    assert named.version is None and named.error


FAKE_PTXAS = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
  *) echo "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'" >&2; exit 255 ;;
esac
"""


def test_ptxas_without_sm_121a(tmp_path: Path) -> None:
    old = put(tmp_path, "/ptxas", FAKE_PTXAS)
    old.chmod(0o755)
    read = triton_probe.read_ptxas(Host(), str(old), "bundled")
    assert (read.version, read.knows_sm_121a) == ("12.8.93", False)
    assert "sm_121a" in (read.error or "")


def test_ptxas_that_fails_for_another_reason_is_unknown_not_false(tmp_path: Path) -> None:
    odd = put(
        tmp_path, "/ptxas", FAKE_PTXAS.replace("Value 'sm_121a' is not defined for option 'gpu-name'", "disk full")
    )
    odd.chmod(0o755)
    assert triton_probe.read_ptxas(Host(), str(odd), "bundled").knows_sm_121a is None


# --- software


def test_conflicts_by_stated_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = {
        "unsloth": [
            "trl>=0.18.2,<=0.24.0",
            "xformers; extra == 'xformers'",
            "pywin32; sys_platform == 'win32'",
            "nonsense !!",
        ],
        "trl": ["not-installed-at-all"],
    }
    monkeypatch.setattr("importlib.metadata.requires", lambda name: stated[name])
    assert software.read_conflicts({"unsloth": "2026.7.3", "trl": "0.26.1"}) == [
        "unsloth 2026.7.3 needs trl<=0.24.0,>=0.18.2, but 0.26.1 is installed"
    ]
    assert software.read_conflicts({"unsloth": "2026.7.3", "trl": "0.24.0"}) == []


def test_packages_are_normalised() -> None:
    packages = software.read_packages()
    assert packages["pydantic"] and "nvidia-ml-py" in packages
    assert all(name == name.lower() and "_" not in name for name in packages)


def test_compiler_absent_and_given(tmp_path: Path) -> None:
    assert software.read_compiler(FakeHost(tmp_path)).model_dump() == {"path": None, "version": None, "searched": True}
    host = FakeHost(
        tmp_path, {"CC": "clang-18 -O2"}, {"--version": Ran(0, "clang 18\nmore\n")}, {"clang-18": "/usr/bin/clang-18"}
    )
    assert software.read_compiler(host).path == "/usr/bin/clang-18"
    assert software.read_compiler(host).version == "clang 18"


def test_bitsandbytes_from_its_files() -> None:
    read = software.read_bitsandbytes(software.read_packages())
    assert read.version and "cpu" in read.libraries and "cuda130" in read.libraries
    assert read.repacks_on_avx512_bf16 is True, "0.50 repacks; a newer one that does not may change this line"
    assert software.read_bitsandbytes({}).version is None


# --- containers


def test_docker_with_runtime(tmp_path: Path) -> None:
    info = '{"ServerVersion": "28.3.3", "Runtimes": {"runc": {}, "nvidia": {}}}'
    host = FakeHost(tmp_path, commands={"docker info": Ran(0, info)}, programs={"docker": "/usr/bin/docker"})
    read = container.read_container(host)
    assert read.usable and read.nvidia_runtime and read.runtimes == ["nvidia", "runc"] and read.error is None


def test_docker_by_cdi(tmp_path: Path) -> None:
    info = '{"ServerVersion": "28.3.3", "Runtimes": {"runc": {}}, "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]}'
    host = FakeHost(tmp_path, commands={"docker info": Ran(0, info)}, programs={"docker": "/usr/bin/docker"})
    assert container.read_container(host).nvidia_runtime


def test_docker_denied(tmp_path: Path) -> None:
    info = '{"ServerErrors": ["permission denied while trying to connect to the Docker daemon socket"]}'
    host = FakeHost(tmp_path, commands={"docker info": Ran(1, info, "x", "x")}, programs={"docker": "/usr/bin/docker"})
    read = container.read_container(host)
    assert (
        read.usable is False and read.error == "permission denied while trying to connect to the Docker daemon socket"
    )


def test_podman_that_answers_wins_over_docker_that_does_not(tmp_path: Path) -> None:
    put(tmp_path, "/etc/cdi/nvidia.yaml")
    host = FakeHost(
        tmp_path,
        commands={
            "docker info": Ran(1, "", "", "Cannot connect to the Docker daemon"),
            "podman info": Ran(0, '{"host": {"ociRuntime": {"name": "crun"}}}'),
        },
        programs={"docker": "/usr/bin/docker", "podman": "/usr/bin/podman"},
    )
    read = container.read_container(host)
    assert (read.engine, read.usable, read.nvidia_runtime, read.runtimes) == ("podman", True, True, ["crun"])
    assert container.read_container(FakeHost(tmp_path)).engine is None


# --- network and environment


def test_tokens_are_seen_and_never_read(tmp_path: Path) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz012345"
    host = FakeHost(tmp_path, {"HF_TOKEN": secret, "HF_HOME": "/cache", "HTTPS_PROXY": "http://u:p@proxy"})
    assert network.token_present(host)
    assert network.read_environment(host) == {"HF_HOME": "/cache"}
    assert not any("TOKEN" in name or "KEY" in name or "PROXY" in name for name in network.KEPT)
    stored = FakeHost(tmp_path, {"HF_HOME": "/cache"})
    assert not network.token_present(stored)
    put(tmp_path, "/cache/token", secret)
    assert network.token_present(stored)


def test_offline_is_not_asked(tmp_path: Path) -> None:
    read = network.read_network(FakeHost(tmp_path, {"HF_HUB_OFFLINE": "1"}))
    assert read.hub_reachable is False and "HF_HUB_OFFLINE" in (read.error or "")


@pytest.mark.parametrize("endpoint", ["file:///etc/passwd", "nonsense"])
def test_odd_endpoint(tmp_path: Path, endpoint: str) -> None:
    assert network.read_network(FakeHost(tmp_path, {"HF_ENDPOINT": endpoint})).hub_reachable is False


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (401, True), (429, True), (403, False), (502, False)])
def test_hub_by_its_answer(tmp_path: Path, status: int, reachable: bool) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = FakeHost(tmp_path, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})
        read = network.read_network(host)
        assert read.hub_reachable is reachable
        assert reachable or str(status) in (read.error or "")
    finally:
        server.shutdown()
        server.server_close()


def test_hub_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        host = FakeHost(tmp_path, {"HF_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}"})
        start = time.monotonic()
        assert network.read_network(host, timeout_s=0.5).hub_reachable is False
        assert time.monotonic() - start < 5
