"""The NVIDIA driver, its device files and the hardware behind it, without calling CUDA.

Four signs are read apart, since which of them agree tells what is wrong: the PCI bus (is there hardware?), the kernel
module (is there a driver?), /dev/nvidia* (was the GPU handed into this container, may this user open it?), and NVML (do
driver and library fit?).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from sparkproof.facts.host import Host
from sparkproof.facts.model import CudaToolkit, Driver, Gpu, GpuProcess

PCI_VENDOR_NVIDIA = "0x10de"
PCI_CLASS_DISPLAY = "0x03"
NVML_TIMEOUT_S = 15
NVCC_TIMEOUT_S = 10


def read_driver(host: Host) -> Driver:
    """Kernel module, device files and PCI devices. NVML's part is added by `collect`."""
    files = [p for p in host.glob("/dev", "nvidia*") if not p.is_dir()]
    pci = [
        p
        for p in host.glob("/sys/bus/pci/devices", "*")
        if _line(p / "vendor") == PCI_VENDOR_NVIDIA and _line(p / "class").startswith(PCI_CLASS_DISPLAY)
    ]
    bound = pci[0] / "driver" if pci else None
    return Driver(
        kernel_module_version=module_version(host.text("/proc/driver/nvidia/version") or ""),
        device_files=[f"/dev/{p.name}" for p in files],
        denied_device_files=[
            f"/dev/{p.name}" for p in files if _needs_access(p.name) and not os.access(p, os.R_OK | os.W_OK)
        ],
        pci_devices=[p.name for p in pci] if host.exists("/sys/bus/pci/devices") else None,
        pci_driver=bound.resolve().name if bound is not None and bound.exists() else None,
        wsl=host.exists("/dev/dxg") and bool(host.glob("/usr/lib/wsl/lib", "libcuda.so*")),
    )


def module_version(text: str) -> str | None:
    """'NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build' -> '580.95.05'."""
    found = re.search(r"Module\b.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else None


def read_nvml(host: Host) -> tuple[Driver, list[Gpu], list[GpuProcess] | None]:
    """What NVML says, asked in a process of its own since a broken driver can hang the caller."""
    ran = host.run_python("sparkproof.facts.nvml_child", NVML_TIMEOUT_S)
    try:
        said = json.loads(ran.out)
    except ValueError:
        return Driver(nvml_errors={"init": ran.error or "no answer"}), [], None
    driver = Driver(version=said["version"], cuda_version=said["cuda_version"], nvml_errors=said["errors"])
    processes = said["processes"]
    return (
        driver,
        [Gpu(**g) for g in said["gpus"]],
        None if processes is None else [GpuProcess(**p) for p in processes],
    )


def read_cuda_driver(host: Host) -> tuple[list[Gpu], str | None]:
    """Device properties by the CUDA driver, without torch and without a context; and why it told none."""
    ran = host.run_python("sparkproof.facts.driver_child", NVML_TIMEOUT_S)
    try:
        said = json.loads(ran.out)
    except ValueError:
        return [], ran.error or "no answer"
    return [Gpu(**g) for g in said["gpus"]], said["error"]


def read_cuda_toolkit(host: Host) -> CudaToolkit:
    """nvcc: CUDA_HOME, then PATH, then the usual place."""
    home = host.environ.get("CUDA_HOME") or host.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else []
    places += [p for p in (host.which("nvcc"),) if p]
    places.append("/usr/local/cuda/bin/nvcc")
    nvcc = next((p for p in places if host.exists(p)), None)
    if nvcc is None:
        return CudaToolkit()
    found = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", host.run([nvcc, "--version"], NVCC_TIMEOUT_S).out)
    return CudaToolkit(nvcc=nvcc, version=(found.group(2) or found.group(1)) if found else None)


def _needs_access(name: str) -> bool:
    """CUDA opens these; nvidia-modeset and nvidia-caps are not needed for compute."""
    return name in ("nvidiactl", "nvidia-uvm") or re.fullmatch(r"nvidia\d+", name) is not None


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
