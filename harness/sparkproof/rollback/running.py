"""Processes and GPU memory: what a fine-tuning stack may leave running. Nothing here is ever ended, only compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from sparkproof.rollback.model import GpuMemory, Process, Processes

NVML_TIMEOUT_S = 15
DRIVER_MARKS = ("/proc/driver/nvidia/version", "/dev/dxg")
# One read of NVML in a process of its own: a driver that hangs must not take this one with it.
_ASK_NVML = """
import json, pynvml
pynvml.nvmlInit()
found = {"devices": {}, "processes": {}}
for i in range(pynvml.nvmlDeviceGetCount()):
    h = pynvml.nvmlDeviceGetHandleByIndex(i)
    uuid = pynvml.nvmlDeviceGetUUID(h)
    uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
    try:
        found["devices"][uuid] = pynvml.nvmlDeviceGetMemoryInfo(h).used
    except pynvml.NVMLError_NotSupported:
        found["devices"][uuid] = None
    for p in pynvml.nvmlDeviceGetComputeRunningProcesses(h):
        found["processes"][str(p.pid)] = found["processes"].get(str(p.pid), 0) + (p.usedGpuMemory or 0)
print(json.dumps(found))
"""


def processes(environments: Iterable[str]) -> Processes:
    """Of this user's processes, those that hold a GPU or whose program lies in one of the environments (real paths)."""
    roots = [e.rstrip("/") + "/" for e in environments]
    me, found = os.getuid(), Processes()
    try:
        mine = psutil.Process()
        skip = {mine.pid, *(p.pid for p in mine.parents()), *(p.pid for p in mine.children(recursive=True))}
        for p in psutil.process_iter(["pid", "uids", "name", "create_time"]):
            if p.pid in skip or p.info["uids"] is None or p.info["uids"].real != me:
                continue
            if why := _why(p, roots):
                found.found[f"{p.pid}@{p.info['create_time']:.2f}"] = Process(name=p.info["name"], why=why)
    except (psutil.Error, OSError) as e:
        found.not_read = f"the process table: {e}"
    return found


def _why(p: psutil.Process, roots: list[str]) -> str:
    try:
        words = p.cmdline()
        program = next((w for w in words[:2] for r in roots if w.startswith(r)), "")
        if program:
            return f"it runs {program}"
        for link in Path(f"/proc/{p.pid}/fd").iterdir():
            target = str(link.readlink())
            if target.startswith(("/dev/nvidia", "/dev/dxg")):
                return f"it holds {target}"
    except (psutil.Error, OSError):
        return ""  # it ended while we looked
    return ""


def gpu_memory() -> GpuMemory:
    """What NVML says; a machine without NVIDIA's driver has none, which is an answer too."""
    if not any(Path(mark).exists() for mark in DRIVER_MARKS):
        return GpuMemory()
    found = GpuMemory(installed=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_NVML], capture_output=True, text=True, timeout=NVML_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as e:
        found.not_read = f"NVML: {e}"
        return found
    if done.returncode:
        said = done.stderr.strip().splitlines()
        found.not_read = f"NVML: {said[-1] if said else 'it said nothing'}"
        return found
    told = GpuMemory.model_validate_json(done.stdout)
    found.devices = told.devices
    for pid, size in told.processes.items():
        try:
            found.processes[f"{pid} {psutil.Process(int(pid)).name()}"] = size
        except psutil.Error:
            found.processes[pid] = size
    return found
