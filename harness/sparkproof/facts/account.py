"""Where the pool went, and what a run may take of it: the arithmetic, from /proc/meminfo. Pure.

MemTotal - processes - shared - kernel - huge pages - drivers - page cache = MemFree
MemAvailable = MemFree + what of page cache and kernel can be reclaimed
a run may take min(MemAvailable - floor, 0.85 MemTotal): the floor is where the watchdog ends it, and above 0.84 of
the pool hosts were seen to thrash
"""

from __future__ import annotations

from pydantic import Field

from sparkproof.facts.model import Facts
from sparkproof.measure.memory import default_floor_gib
from sparkproof.results import Strict

MOST_OF_POOL = 0.85


class Account(Strict):
    """All in GiB; None where /proc/meminfo did not tell."""

    unified: bool = Field(description="CPU and GPU share this pool.")
    total_gib: float
    processes_gib: float | None = Field(description="Private pages of processes (AnonPages).")
    shared_gib: float | None = Field(description="tmpfs such as /dev/shm, and shared mappings (Shmem).")
    kernel_gib: float | None = Field(description="Slab, stacks, page tables.")
    huge_pages_gib: float | None
    drivers_gib: float | None = Field(description="What no owner is named for: mostly GPU memory on a shared pool.")
    page_cache_gib: float | None = Field(description="Cached less Shmem: files, given back when memory is wanted.")
    free_gib: float | None = Field(description="MemFree.")
    available_gib: float
    reclaimable_gib: float | None = Field(description="MemAvailable less MemFree.")
    cuda_free_gib: float | None = Field(description="Free by cudaMemGetInfo, which does not count page cache.")
    floor_gib: float = Field(description="The watchdog ends a run under it.")
    may_take_gib: float = Field(description="min(available - floor, 0.85 total), not below 0.")
    swap_used_gib: float | None
    swap_total_gib: float | None
    gpu_processes: list[str] = Field(description="Who else holds GPU memory, as 'name pid, GiB'.")


def account(facts: Facts) -> Account | None:
    """The account of these facts; None without MemTotal and MemAvailable."""
    m = facts.memory
    if m.total_gib is None or m.available_gib is None:
        return None
    floor = default_floor_gib(m.total_gib)
    most = max(0.0, min(m.available_gib - floor, MOST_OF_POOL * m.total_gib))
    swap = None if m.swap_total_gib is None or m.swap_free_gib is None else m.swap_total_gib - m.swap_free_gib
    return Account(
        unified=facts.unified,
        total_gib=m.total_gib,
        processes_gib=m.anonymous_gib,
        shared_gib=m.shared_gib,
        kernel_gib=m.kernel_gib,
        huge_pages_gib=m.huge_pages_gib,
        drivers_gib=m.unaccounted_gib,
        page_cache_gib=None if m.cached_gib is None else round(max(0.0, m.cached_gib - (m.shared_gib or 0.0)), 3),
        free_gib=m.free_gib,
        available_gib=m.available_gib,
        reclaimable_gib=None if m.free_gib is None else round(m.available_gib - m.free_gib, 3),
        cuda_free_gib=m.cuda_free_gib,
        floor_gib=round(floor, 3),
        may_take_gib=round(most, 3),
        swap_used_gib=None if swap is None else round(swap, 3),
        swap_total_gib=m.swap_total_gib,
        gpu_processes=[
            f"{p.name or 'process'} {p.pid}, {f'{p.memory_gib:.1f} GiB' if p.memory_gib is not None else 'size not told'}"
            for p in facts.gpu_processes or []
        ],
    )


def lines(a: Account) -> list[tuple[str, str]]:
    """The account in words: a label and its arithmetic."""
    pool = f"{a.total_gib:.1f} GiB{', shared by CPU and GPU' if a.unified else ''}"
    parts = [
        ("processes", a.processes_gib),
        ("shared", a.shared_gib),
        ("kernel", a.kernel_gib),
        ("huge pages", a.huge_pages_gib),
        ("drivers", a.drivers_gib),
        ("page cache", a.page_cache_gib),
    ]
    taken = " - ".join(f"{value:.1f} {name}" for name, value in parts if value is not None and value >= 0.05)
    rows = [("pool", pool)]
    if a.free_gib is not None:
        known = sum(value for _, value in parts if value is not None)
        rest = a.total_gib - known - a.free_gib  # buffers, swap cache and rounding
        other = f" - {rest:.1f} buffers" if rest >= 0.05 else ""
        rows.append(("free", f"{a.total_gib:.1f}{f' - {taken}' if taken else ''}{other} = {a.free_gib:.1f}"))
        rows.append(
            ("available", f"{a.free_gib:.1f} free + {a.reclaimable_gib:.1f} reclaimable = {a.available_gib:.1f}")
        )
    if a.cuda_free_gib is not None and a.unified:
        gap = a.available_gib - a.cuda_free_gib
        rows.append(
            (
                "CUDA's free",
                f"{a.cuda_free_gib:.1f}, which is {gap:.1f} less than can be had: page cache counts as used",
            )
        )
    limit = f"min({a.available_gib:.1f} available - {a.floor_gib:.1f} floor, {MOST_OF_POOL} x {a.total_gib:.1f})"
    rows.append(("a run may take", f"{limit} = {a.may_take_gib:.1f}"))
    if a.swap_total_gib is not None and a.swap_used_gib is not None:
        rows.append(("swap", f"{a.swap_used_gib:.1f} of {a.swap_total_gib:.1f} in use"))
    if a.unified:
        rows.append(("GPU's others", "; ".join(a.gpu_processes) or "none that NVML lists"))
    return rows
