"""Operating system, processor, limits, disk and /dev/shm."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from pathlib import Path

from sparkproof.facts.host import Host
from sparkproof.facts.model import UNLIMITED, Cpu, Disk, Limits, Os, Shm
from sparkproof.measure.memory import GIB


def read_os(host: Host) -> Os:
    """Name and version from /etc/os-release, kernel from uname, DGX release and product where they exist."""
    release = _assignments(host.text("/etc/os-release") or "")
    dgx = _assignments(host.text("/etc/dgx-release") or "")
    product = (host.text("/sys/class/dmi/id/product_name") or "").strip()
    return Os(
        name=release.get("ID"),
        version=release.get("PRETTY_NAME"),
        kernel=platform.release(),
        in_container=in_container(host),
        product=product or None,
        dgx_release=dgx.get("DGX_OTA_VERSION") or dgx.get("DGX_SWBUILD_VERSION"),
    )


def in_container(host: Host) -> bool:
    """Whether the root file system came out of an image: the marks that engines leave."""
    if host.exists("/.dockerenv") or host.exists("/run/.containerenv") or host.environ.get("container"):
        return True
    groups = host.text("/proc/1/cgroup") or ""
    return any(mark in groups for mark in ("/docker", "/kubepods", "/libpod", "/lxc"))


def read_cpu(host: Host) -> Cpu:
    """Model and flags from /proc/cpuinfo (x86 says 'flags', Arm 'Features'), cores from the affinity mask."""
    model, flags = None, None
    for line in (host.text("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        match key.strip():
            case "model name" | "Model" if model is None:
                model = value.strip()
            case "flags" | "Features" if flags is None:
                flags = set(value.split())
    return Cpu(
        model=model,
        cores=len(os.sched_getaffinity(0)),
        avx512_bf16=None if flags is None else "avx512_bf16" in flags,
    )


def read_limits() -> Limits:
    """Soft limits of this process."""

    def soft(which: int) -> int:
        value = resource.getrlimit(which)[0]
        return UNLIMITED if value == resource.RLIM_INFINITY else value

    return Limits(
        memlock_bytes=soft(resource.RLIMIT_MEMLOCK),
        stack_bytes=soft(resource.RLIMIT_STACK),
        nofile=soft(resource.RLIMIT_NOFILE),
    )


def read_disk() -> Disk:
    """The file system under the working folder."""
    here = Path.cwd()
    usage = shutil.disk_usage(here)
    return Disk(path=str(here), free_gib=round(usage.free / GIB, 2), total_gib=round(usage.total / GIB, 2))


def read_shm(host: Host) -> Shm:
    """Size and use of /dev/shm."""
    usage = shutil.disk_usage(host.path("/dev/shm"))
    return Shm(size_gib=round(usage.total / GIB, 3), used_gib=round(usage.used / GIB, 3))


def _assignments(text: str) -> dict[str, str]:
    """KEY=value lines, quotes taken off."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}
