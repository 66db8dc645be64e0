"""Memory as the kernel reports it: on a shared pool NVML reports none and cudaMemGetInfo counts page cache as used."""

from __future__ import annotations

import psutil

GIB = 2.0**30


def available_gib() -> float:
    """MemAvailable of /proc/meminfo, in GiB."""
    return float(psutil.virtual_memory().available) / GIB


def total_gib() -> float:
    """MemTotal, in GiB."""
    return float(psutil.virtual_memory().total) / GIB


def tree_rss_gib(pid: int) -> float:
    """Resident memory of a process and all its descendants, in GiB; 0 when it has gone."""
    try:
        root = psutil.Process(pid)
        return sum(_rss(p) for p in [root, *root.children(recursive=True)]) / GIB
    except psutil.Error:
        return 0.0


def _rss(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss)
    except psutil.Error:
        return 0.0


def default_floor_gib(total: float | None = None) -> float:
    """The floor under which a case is ended: 16 GiB on a 128 GB Spark, an eighth of smaller machines, at least 1 GiB."""
    total = total_gib() if total is None else total
    return min(16.0, max(1.0, total / 8))
