"""Memory as the kernel reports it: on a shared pool NVML reports none and cudaMemGetInfo counts page cache as used.

What is available is the lesser of two counts: /proc/meminfo's MemAvailable, which is the host's also inside a container, and
what the control groups of this process still allow. At a group's limit the kernel kills without a word, so the watchdog has to
see that limit come as it sees the host's.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2.0**30
NO_LIMIT = 2**60  # cgroup v1 writes "none" as a number near 2**63
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Limit:
    """One control group with a limit. Sizes in bytes."""

    folder: Path
    version: int
    limit: int

    def headroom(self) -> float:
        """Bytes that may still be taken: the limit less what is in use, page cache that can be dropped not counted as used."""
        name, key = (
            ("memory.current", "inactive_file")
            if self.version == 2
            else ("memory.usage_in_bytes", "total_inactive_file")
        )
        used = int((self.folder / name).read_text())
        droppable = 0
        for line in (self.folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{key} "):
                droppable = int(line.split()[1])
        return max(0.0, float(self.limit - used + droppable))


@functools.cache
def limits() -> tuple[Limit, ...]:
    """The control groups above this process that limit its memory, its own first; read once, as a process stays in its own."""
    return tuple(find_limits(MEMBERSHIP, CGROUPS))


def find_limits(membership: Path, root: Path) -> list[Limit]:
    """The groups of `membership` (a /proc/<pid>/cgroup) under `root` that have a limit, innermost first; v1 and v2.

    In a container the path names the host's tree, of which only the container's own group is mounted: then that is read.
    """
    found: list[Limit] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version, base, name = 1, root / "memory", "memory.limit_in_bytes"
        elif number == "0" and not controllers:
            version, base, name = 2, root, "memory.max"
        else:
            continue
        inner = base / path.lstrip("/")
        folders = [inner, *inner.parents] if inner.is_dir() else [base]
        for folder in folders:
            if not folder.is_relative_to(base):
                break
            with contextlib.suppress(OSError, ValueError):  # the root of v2 has no limit, and "max" is none
                limit = int((folder / name).read_text())
                if limit < NO_LIMIT:
                    found.append(Limit(folder, version, limit))
    return found


def available_gib() -> float:
    """What may still be taken, in GiB: MemAvailable, or less where a control group allows less."""
    room = float(psutil.virtual_memory().available)
    for limit in limits():
        with contextlib.suppress(OSError, ValueError):
            room = min(room, limit.headroom())
    return room / GIB


def total_gib() -> float:
    """MemTotal, or the least limit of a control group, in GiB."""
    return min([float(psutil.virtual_memory().total), *(float(x.limit) for x in limits())]) / GIB


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
