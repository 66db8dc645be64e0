"""The child processes' own code, with stand-ins for the libraries that need a GPU, and the real ones where there are
any."""

from __future__ import annotations

import ctypes
import json
import sys
import types
import warnings
from typing import Any

import pynvml
import pytest
import torch
from sparkproof.facts import driver_child, nvml_child, torch_child, torch_probe
from sparkproof.facts.model import Gpu

GIB = 2**30
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


# --- torch


class CudaDevice:
    """As much of torch.cuda as the child asks, for one GB10."""

    def __init__(self, warning: str = "", init_error: str = "", free_error: str = "") -> None:
        self.warning, self.init_error, self.free_error = warning, init_error, free_error

    def is_available(self) -> bool:
        return True

    def init(self) -> None:
        if self.warning:
            warnings.warn(self.warning, UserWarning, stacklevel=1)
        if self.init_error:
            raise RuntimeError(self.init_error)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if self.free_error:
            raise RuntimeError(self.free_error)
        return 100 * GIB, 120 * GIB

    def device_count(self) -> int:
        return 1

    def get_device_properties(self, index: int) -> Any:
        return types.SimpleNamespace(
            name="NVIDIA GB10",
            uuid="0001",
            major=12,
            minor=1,
            multi_processor_count=48,
            is_integrated=1,
            total_memory=120 * GIB,
            shared_memory_per_block_optin=101376,
        )


def run_torch_child(monkeypatch: Patch, capsys: Capture, cuda: Any, cuda_version: str | None) -> Any:
    fake: Any = types.ModuleType("torch")
    fake.__version__, fake.__file__, fake.cuda = "2.14.1+cu130", "/x/torch/__init__.py", cuda
    fake.version = types.SimpleNamespace(cuda=cuda_version)
    fake._C = types.SimpleNamespace(_cuda_getArchFlags=lambda: "sm_100 sm_120")
    fake.backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(version=lambda: 91300))
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(torch_child, "compute", lambda module, device: torch_compute(device))
    torch_child.main()
    return torch_probe.merge(capsys.readouterr().out)


def torch_compute(device: str) -> str | None:
    assert device == "cuda:0"
    return None


def test_torch_on_a_gb10(monkeypatch: Patch, capsys: Capture) -> None:
    warning = "Found GPU0 NVIDIA GB10 which is of cuda capability 12.1.\n    Minimum and Maximum ..."
    said = run_torch_child(monkeypatch, capsys, CudaDevice(warning), "13.0")
    assert said["done"] and said["cuda_free_gib"] == 100 and said["cuda_total_gib"] == 120
    assert said["torch"]["arch_list"] == ["sm_100", "sm_120"] and said["torch"]["cudnn"] == "91300"
    assert said["torch"]["warnings"] == [
        "Found GPU0 NVIDIA GB10 which is of cuda capability 12.1. Minimum and Maximum ..."
    ]
    gpu = Gpu(**said["gpus"][0])
    assert gpu.capability == (12, 1) and gpu.integrated is True and gpu.usable_by_torch is True
    assert gpu.uuid == "GPU-0001" and gpu.shared_memory_per_block_optin == 101376


def test_torch_whose_cuda_does_not_start(monkeypatch: Patch, capsys: Capture) -> None:
    said = run_torch_child(monkeypatch, capsys, CudaDevice(init_error="driver too old"), "13.0")
    assert said["torch"]["cuda_available"] is False
    assert said["torch"]["error"] == "RuntimeError: driver too old" and "gpus" not in said


def test_torch_that_fails_later_keeps_what_it_said(monkeypatch: Patch, capsys: Capture) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run_torch_child(monkeypatch, capsys, CudaDevice(free_error="CUDA out of memory"), "13.0")
    said = torch_probe.merge(capsys.readouterr().out)
    assert said["stage"] == "it asked for free memory" and "done" not in said
    assert said["torch"]["version"] == "2.14.1+cu130"


def test_computation_agrees_on_the_cpu() -> None:
    assert torch_child.compute(torch, "cpu") is None


def test_computation_catches_zeros_and_exceptions(monkeypatch: Patch) -> None:
    real = torch.Tensor.__matmul__
    bf16 = torch.bfloat16

    def zeros(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return real(a, b) * 0 if a.dtype is bf16 else real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", zeros)
    assert "the product of two bf16 matrices is off by" in (torch_child.compute(torch, "cpu") or "")

    def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert torch_child.compute(torch, "cpu") == "RuntimeError: CUDA error: no kernel image is available"


def test_computation_catches_a_wrong_gradient(monkeypatch: Patch) -> None:
    real = torch.Tensor.__matmul__

    def detached(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = real(a, b)
        return y.detach() + 0 * a if a.dtype is torch.bfloat16 else y

    monkeypatch.setattr(torch.Tensor, "__matmul__", detached)
    assert "the gradient" in (torch_child.compute(torch, "cpu") or "")


# --- NVML


def nvml_says(monkeypatch: Patch, capsys: Capture, **answers: Any) -> Any:
    """Run the child over the real binding, with each C call replaced: a value, or an NVML error code to raise."""

    def answer(value: Any) -> Any:
        def function(*arguments: Any) -> Any:
            if isinstance(value, pynvml.NVMLError):
                raise value
            return value

        return function

    defaults: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlSystemGetDriverVersion": "580.95.05",
        "nvmlSystemGetCudaDriverVersion_v2": 13000,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetCudaComputeCapability": (12, 1),
        "nvmlDeviceGetMemoryInfo": pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED),
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1,
        "nvmlDeviceGetPowerUsage": 11234,
        "nvmlDeviceGetName": "NVIDIA GB10",
        "nvmlDeviceGetUUID": "GPU-1",
        "nvmlDeviceGetClockInfo": 208,
        "nvmlDeviceGetMaxClockInfo": 3003,
        "nvmlDeviceGetTemperature": 38,
        "nvmlDeviceGetComputeRunningProcesses": [],
        "nvmlDeviceGetGraphicsRunningProcesses": [],
    }
    for name, value in (defaults | answers).items():
        monkeypatch.setattr(pynvml, name, answer(value))
    nvml_child.main()
    return json.loads(capsys.readouterr().out)


def test_nvml_of_a_gb10(monkeypatch: Patch, capsys: Capture) -> None:
    said = nvml_says(monkeypatch, capsys)
    assert said["errors"] == {"memory": "Not Supported"}, "a fact, and the other answers are there"
    gpu = Gpu(**said["gpus"][0])
    assert gpu.memory_total_gib is None and gpu.max_sm_clock_mhz == 3003 and gpu.power_w == 11.2
    assert gpu.throttle_reasons == [], "idle is no throttling"
    assert said["cuda_version"] == "13.0" and said["processes"] == []


def test_nvml_processes_once_each(monkeypatch: Patch, capsys: Capture) -> None:
    # the second number lies above the largest that a process can have
    compute = [
        types.SimpleNamespace(pid=1, usedGpuMemory=2 * GIB),
        types.SimpleNamespace(pid=2**22 + 5, usedGpuMemory=None),
    ]
    graphics = [types.SimpleNamespace(pid=1, usedGpuMemory=GIB)]
    said = nvml_says(
        monkeypatch,
        capsys,
        nvmlDeviceGetComputeRunningProcesses=compute,
        nvmlDeviceGetGraphicsRunningProcesses=graphics,
    )
    assert [(p["pid"], p["memory_gib"]) for p in said["processes"]] == [(1, 2.0), (2**22 + 5, None)]
    assert said["processes"][0]["name"] and said["processes"][1]["name"] is None


def test_nvml_slowdowns_by_the_bindings_own_bits(monkeypatch: Patch, capsys: Capture) -> None:
    bits = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    said = nvml_says(monkeypatch, capsys, nvmlDeviceGetCurrentClocksThrottleReasons=bits)
    assert said["gpus"][0]["throttle_reasons"] == ["hardware thermal slowdown", "hardware power brake"]


def test_nvml_unknown_processes_are_not_none_at_all(monkeypatch: Patch, capsys: Capture) -> None:
    denied = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
    said = nvml_says(
        monkeypatch, capsys, nvmlDeviceGetComputeRunningProcesses=denied, nvmlDeviceGetGraphicsRunningProcesses=denied
    )
    assert said["processes"] is None and said["errors"]["processes"] == "Insufficient Permissions"


def test_nvml_mismatch(monkeypatch: Patch, capsys: Capture) -> None:
    broken = pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    said = nvml_says(monkeypatch, capsys, nvmlInit=broken)
    assert said["errors"]["init"] == "RM has detected an NVML/RM version mismatch."
    assert said["gpus"] == [] and said["processes"] is None


# --- CUDA driver


class Driver:
    """libcuda of one GB10: fills what it is given by reference, as the C functions do."""

    attributes = {16: 48, 18: 1, 75: 12, 76: 1, 97: 101376}  # noqa: RUF012

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA GB10"
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:
        total._obj.value = 120 * GIB
        return 0

    def cuDeviceGetUuid(self, identity: Any, device: Any) -> int:
        ctypes.memmove(identity._obj, bytes(range(16)), 16)
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:
        if which not in self.attributes:
            return 1
        value._obj.value = self.attributes[which]
        return 0


def driver_says(monkeypatch: Patch, capsys: Capture, driver: Any) -> Any:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    driver_child.main()
    return json.loads(capsys.readouterr().out)


def test_driver_of_a_gb10(monkeypatch: Patch, capsys: Capture) -> None:
    said = driver_says(monkeypatch, capsys, Driver())
    assert said["error"] is None
    assert Gpu(**said["gpus"][0]).model_dump(exclude_none=True, exclude_defaults=True) == {
        "name": "NVIDIA GB10",
        "uuid": "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f",
        "compute_capability": "12.1",
        "sm_count": 48,
        "shared_memory_per_block_optin": 101376,
        "integrated": True,
        "memory_total_gib": 120.0,
    }


def test_driver_that_does_not_start(monkeypatch: Patch, capsys: Capture) -> None:
    assert driver_says(monkeypatch, capsys, Driver(code=803)) == {"gpus": [], "error": "CUDA error 803"}


def test_driver_that_is_not_there(monkeypatch: Patch, capsys: Capture) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver_child.main()
    assert json.loads(capsys.readouterr().out)["error"] == "libcuda.so.1: cannot open shared object file"
