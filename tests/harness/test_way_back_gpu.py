"""GPU memory in the way back: what NVML says, what counts as a difference, and what a driver does not tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rollback_machine import Machine
from sparkproof.rollback import diff_host, running
from sparkproof.rollback.model import GpuMemory, Snapshot
from sparkproof.rollback.parts import Part

GIB = 2**30
NVML = """
import os
class NVMLError_NotSupported(Exception): pass
class Of:
    def __init__(self, **values): self.__dict__.update(values)
def nvmlInit():
    if os.environ.get("FAKE_NVML") == "broken": raise RuntimeError("Driver/library version mismatch")
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlDeviceGetUUID(h): return "GPU-1"
def nvmlDeviceGetMemoryInfo(h):
    if os.environ.get("FAKE_NVML") == "unified": raise NVMLError_NotSupported()
    return Of(used=1000)
def nvmlDeviceGetComputeRunningProcesses(h): return [Of(pid=int(os.environ["FAKE_PID"]), usedGpuMemory=None)]
"""


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A driver as far as these questions go."""
    (tmp_path / "pynvml.py").write_text(NVML)
    (tmp_path / "version").touch()
    monkeypatch.setattr(running, "DRIVER_MARKS", (str(tmp_path / "version"),))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_PID", str(os.getpid()))
    return monkeypatch


def test_what_nvml_says(nvml: pytest.MonkeyPatch) -> None:
    found = running.gpu_memory()
    assert found.installed and not found.not_read and found.devices == {"GPU-1": 1000}
    (name,) = found.processes
    assert name.startswith(f"{os.getpid()} ") and found.processes[name] == 0
    nvml.setenv("FAKE_NVML", "unified")
    assert running.gpu_memory().devices == {"GPU-1": None}, "as GB10's driver answers"
    nvml.setenv("FAKE_NVML", "broken")
    assert "version mismatch" in running.gpu_memory().not_read


def test_no_driver_is_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(running, "DRIVER_MARKS", (str(tmp_path / "none"),))
    assert running.gpu_memory() == GpuMemory()


def part(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> Part:
    base = Machine(tmp_path / "m").snap() if not (tmp_path / "m").exists() else None
    assert base is not None

    def with_gpu(values: dict[str, Any]) -> Snapshot:
        return base.model_copy(update={"gpu": GpuMemory(installed=True, **values)})

    return next(diff_host.gpu(with_gpu(before), with_gpu(after)))


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        ({"devices": {"a": GIB}}, {"devices": {"a": GIB + 2**20}}, "equal"),  # a window was opened
        ({"devices": {"a": GIB}}, {"devices": {"a": 2 * GIB}}, "differs"),
        ({"devices": {"a": None}}, {"devices": {"a": None}}, "equal"),
        ({"devices": {"a": None}}, {"devices": {"a": None}, "processes": {"7 python": GIB}}, "differs"),
        ({"processes": {"7 python": GIB}}, {}, "equal"),  # it ended: no trace
        ({}, {"not_read": "NVML: broken"}, "unknown"),
    ],
)
def test_what_counts_as_a_difference(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], state: str) -> None:
    assert part(tmp_path, before, after).state == state
