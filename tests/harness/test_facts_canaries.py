"""The canaries' arithmetic, with a device by which everything takes two milliseconds."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch
from sparkproof.facts import canaries_child, trials
from sparkproof.facts.host import Ran

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


class Event:
    """A CUDA event by which everything takes two milliseconds."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 2.0


class Nvml:
    """As much of pynvml as the sensors ask."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetClockInfo(self, handle: str, which: int) -> int:
        assert handle == "GPU-0001"
        return 2405

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetTemperature(self, handle: str, which: int) -> int:
        return 62

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 0x1 | 0x20


@pytest.fixture
def device(monkeypatch: Patch) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 * gib, 120 * gib))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="0001"))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())  # type: ignore[arg-type]
    for name in ("empty", "ones"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, device=None, **k: real(*a, **k))
    monkeypatch.setattr(canaries_child, "COPY_BYTES", 2**22)
    monkeypatch.setattr(canaries_child, "GEMV_SHAPE", (1024, 2048))
    monkeypatch.setattr(canaries_child, "GEMM_SIZE", 256)
    monkeypatch.setattr(canaries_child, "LOAD_S", 0.05)
    monkeypatch.setattr(canaries_child, "WARM_S", 0.0)
    monkeypatch.setattr(canaries_child, "IN_A_ROW", 1)


def test_canaries_count_bytes_and_operations(device: None, capsys: Capture) -> None:
    canaries_child.canaries(torch)
    found = trials.merge(capsys.readouterr().out)["canaries"]
    assert found["copy_gb_s"] == round(2 * 2**22 / 2e-3 / 1e9, 1) == 4.2
    assert found["gemv_gb_s"] == round(1024 * 2048 * 2 / 2e-3 / 1e9, 1) == 2.1
    assert found["gemm_tflops"] == 0.8, "fifty products between two events"
    assert found["load_clock_mhz"] == 2405 and found["load_temperature_c"] == 62
    assert found["load_throttle_reasons"] == ["software thermal slowdown"] and "load_power_w" not in found


def test_calls_are_timed_in_rows_after_a_warm_up_by_time(device: None, monkeypatch: Patch) -> None:
    """An idle GPU's clock rises in tens of milliseconds, and a launch takes longer than a short product."""
    monkeypatch.setattr(canaries_child, "WARM_S", 0.05)
    monkeypatch.setattr(canaries_child, "IN_A_ROW", 4)
    calls: list[float] = []
    held: list[int] = []  # how many calls had been made when the device was given something to do first
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: held.append(len(calls)))
    first = time.perf_counter()
    assert canaries_child.timed_ms(torch, lambda: calls.append(time.perf_counter()), 3) == 2.0 / 4
    assert held == [len(calls) - 12, len(calls) - 8, len(calls) - 4], "the device waits while a row is queued"
    assert sum(t - first >= 0.05 for t in calls) >= 12, "what is timed comes after the warm-up"
    assert len(calls) % 4 == 0


def test_canaries_keep_away_from_the_floor(device: None, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(canaries_child, "available_gib", lambda: 17.0)
    monkeypatch.setattr(canaries_child, "default_floor_gib", lambda: 16.0)
    monkeypatch.setattr(canaries_child, "copy_rate", lambda t: pytest.fail("nothing may be allocated"))
    canaries_child.canaries(torch)
    assert "above the floor" in trials.merge(capsys.readouterr().out)["canaries"]["error"]


def test_the_child_from_end_to_end(device: None, capsys: Capture) -> None:
    canaries_child.main()
    ran = Ran(0, capsys.readouterr().out)
    host = types.SimpleNamespace(run_python=lambda *a, **k: ran)
    found = trials.read_canaries(host)  # type: ignore[arg-type]
    assert found.error is None and found.load_clock_mhz == 2405 and found.gemm_tflops and found.load_s
