"""Capabilities against Facts: what a case requires and this machine lacks."""

from __future__ import annotations

from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass
from sparkproof.scenario import Requires


def unmet(requires: Requires, facts: Facts) -> tuple[ReasonClass, str] | None:
    """The first requirement that `facts` do not meet, as a reason class and a sentence; None when all are met.

    What could not be read counts as not met: a case never starts on a guess.
    """
    gpu = facts.gpu if facts.gpu is not None and facts.gpu.usable_by_torch else None
    wants_gpu = (
        requires.gpu
        or requires.min_compute_capability is not None
        or requires.unified_memory
        or requires.gpu_memory_gib > 0
    )
    if requires.arch and facts.arch not in requires.arch:
        return ReasonClass.ARCH, f"needs {' or '.join(requires.arch)}; this machine is {facts.arch}"
    if wants_gpu and gpu is None:
        seen = f"torch cannot use the {facts.gpu.name}" if facts.gpu else "there is none"
        return ReasonClass.GPU, f"needs a CUDA GPU that torch can use; {seen}"
    if gpu is not None and requires.min_compute_capability is not None:
        have = float(gpu.compute_capability) if gpu.compute_capability else 0.0
        if have < requires.min_compute_capability:
            return (
                ReasonClass.COMPUTE_CAPABILITY,
                f"needs compute capability {requires.min_compute_capability}; {gpu.name} has {have}",
            )
    if requires.unified_memory and gpu is not None and not gpu.integrated:
        return ReasonClass.UNIFIED_MEMORY, f"needs CPU and GPU to share one memory pool; {gpu.name} has its own"
    available = facts.memory.available_gib
    if requires.memory_gib and (available is None or available < requires.memory_gib):
        return ReasonClass.MEMORY, f"needs {requires.memory_gib:g} GiB of available memory; there are {_gib(available)}"
    if requires.gpu_memory_gib and gpu is not None:
        free = available if gpu.integrated else facts.memory.cuda_free_gib
        if free is None or free < requires.gpu_memory_gib:
            return ReasonClass.MEMORY, f"needs {requires.gpu_memory_gib:g} GiB of GPU memory; there are {_gib(free)}"
    free_disk = facts.disk.free_gib
    if requires.disk_gib and (free_disk is None or free_disk < requires.disk_gib):
        return ReasonClass.DISK, f"needs {requires.disk_gib:g} GiB of free disk; there are {_gib(free_disk)}"
    if requires.network and not facts.network.hub_reachable:
        return ReasonClass.NETWORK, "needs the Hugging Face hub, which was not reached"
    if requires.container_engine and not facts.container.usable:
        return (
            ReasonClass.CONTAINER,
            f"needs Docker or Podman to answer: {facts.container.error or 'none is installed'}",
        )
    missing = [p for p in requires.packages if p.lower().replace("_", "-") not in facts.packages]
    if missing:
        return ReasonClass.SOFTWARE, f"needs {', '.join(missing)}, which is not installed"
    return None


def _gib(value: float | None) -> str:
    return "an unknown number" if value is None else f"{value:.1f}"
