"""/proc/meminfo, in full: who holds the pool can be told from it even where NVML reports no memory.

The kernel names an owner for almost all memory: free, page cache, private pages of processes, its own slab, stacks and
tables, huge pages. What is left over was taken page by page by drivers, and on a machine whose GPU shares the pool
that is GPU memory:

    unaccounted = MemTotal - MemFree - Buffers - Cached - SwapCached - AnonPages - Slab - KernelStack - PageTables
                  - SecPageTables - Percpu - Hugetlb

/proc/meminfo is the host's also inside a container.
"""

from __future__ import annotations

from sparkproof.facts.host import Host
from sparkproof.facts.model import Memory

KIB_PER_GIB = 2**20
KERNEL = ("Slab", "KernelStack", "PageTables", "SecPageTables", "Percpu")
OWNED = ("MemFree", "Buffers", "Cached", "SwapCached", "AnonPages", "Hugetlb", *KERNEL)


def read_memory(host: Host) -> Memory:
    """Sizes in GiB; a field that this kernel does not have stays None."""
    text = host.text("/proc/meminfo")
    if text is None:
        raise OSError("/proc/meminfo cannot be read")
    kib = parse(text)

    def gib(*keys: str) -> float | None:
        return round(sum(kib.get(k, 0) for k in keys) / KIB_PER_GIB, 3) if keys[0] in kib else None

    unaccounted = None
    if {"MemTotal", "MemFree", "Cached", "AnonPages", "Slab"} <= kib.keys():
        unaccounted = round(max(0, kib["MemTotal"] - sum(kib.get(k, 0) for k in OWNED)) / KIB_PER_GIB, 3)
    return Memory(
        total_gib=gib("MemTotal"),
        available_gib=gib("MemAvailable"),
        free_gib=gib("MemFree"),
        cached_gib=gib("Cached"),
        swap_total_gib=gib("SwapTotal"),
        swap_free_gib=gib("SwapFree"),
        anonymous_gib=gib("AnonPages"),
        shared_gib=gib("Shmem"),
        kernel_gib=gib(*KERNEL),
        huge_pages_gib=gib("Hugetlb"),
        unaccounted_gib=unaccounted,
    )


def parse(text: str) -> dict[str, int]:
    """Key -> KiB for the lines that carry a size."""
    sizes = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            sizes[key.strip()] = int(words[0])
    return sizes
