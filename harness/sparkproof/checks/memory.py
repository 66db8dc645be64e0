"""Is the memory there that the machine has, and does everything agree on how much that is?

On a shared pool three counts differ by nature: MemAvailable (what can be had), MemFree and cudaMemGetInfo (what
nobody has touched yet, page cache excluded), and NVML (nothing). What is held by nobody is judged from the kernel's
own account, never from a guess about normal use: memory that has no owner in /proc/meminfo was taken by a driver, and
if no GPU process accounts for it, it was not given back.
"""

from __future__ import annotations

from sparkproof.checks.gpu import NO_USABLE_GPU
from sparkproof.checks.lore import LORE
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts, GpuProcess
from sparkproof.measure.memory import default_floor_gib
from sparkproof.results import ReasonClass

PAGE_CACHE_GAP_GIB = 10.0
# A driver keeps some memory for itself; what is more than both of these was left behind.
HELD_GIB = 6.0
HELD_FRACTION = 0.05
HELD_DISCRETE_GIB = 2.0  # our own probe's context is counted, about half a GiB
NEIGHBOUR_FRACTION = 0.10
SWAP_GIB = 4.0


@check("memory.nvml")
def nvml(facts: Facts) -> Answer:
    """Row 36: by design on a shared pool, a fault elsewhere."""
    if not facts.gpus:
        return NotApplicable("no NVIDIA GPU", ReasonClass.GPU)
    error = facts.driver.nvml_errors.get("memory")
    if "init" in facts.driver.nvml_errors:
        return NotRead(f"NVML ({facts.driver.nvml_errors['init']})")
    if error is None:
        return Ok("NVML reports the GPU's memory")
    if facts.unified:
        total = facts.memory.total_gib
        return Found(f"NVML's memory query: {error}. The pool has {total} GiB, as /proc/meminfo says")
    if facts.gpus[0].integrated is None:
        return NotRead("whether the GPU shares the host's memory, so NVML's answer cannot be judged")
    return Found(
        f"NVML's memory query on {facts.gpus[0].name}, which has memory of its own: {error}",
        cause="A GPU with its own memory should report it: the driver knows it in part only, or it is virtual.",
        fix="nvidia-smi -q -d MEMORY",
    )


@check("memory.page_cache")
def page_cache(facts: Facts) -> Answer:
    """Row 37."""
    if not facts.unified:
        return NotApplicable("CPU and GPU do not share one memory pool", _pool_reason(facts))
    if not facts.gpus[0].usable_by_torch:
        return NO_USABLE_GPU
    available, free = facts.memory.available_gib, facts.memory.cuda_free_gib
    if available is None or free is None:
        return NotRead("MemAvailable or cudaMemGetInfo")
    seen = f"MemAvailable {available:.1f} GiB, free by cudaMemGetInfo {free:.1f} GiB"
    if available - free > PAGE_CACHE_GAP_GIB:
        cached = facts.memory.cached_gib
        return Found(f"{seen}{f', page cache {cached:.1f} GiB' if cached is not None else ''}")
    return Ok(seen)


@check("memory.held")
def held(facts: Facts) -> Answer:
    """Row 43: what is in use less every known user. Processes of unknown size, or unseen ones, forbid a verdict."""
    gpu, memory = facts.gpu, facts.memory
    if gpu is None or not gpu.usable_by_torch:
        return NO_USABLE_GPU
    if gpu.integrated is None:
        return NotRead("whether the GPU shares the host's memory")
    if gpu.integrated:
        if memory.total_gib is None or memory.unaccounted_gib is None:
            return NotRead("/proc/meminfo in full")
        used, bound = memory.unaccounted_gib, max(HELD_GIB, HELD_FRACTION * memory.total_gib)
        what = f"{used:.1f} of {memory.total_gib:.1f} GiB have no owner in /proc/meminfo"
    else:
        if memory.cuda_total_gib is None or memory.cuda_free_gib is None:
            return NotRead("cudaMemGetInfo")
        used, bound = memory.cuda_total_gib - memory.cuda_free_gib, HELD_DISCRETE_GIB
        what = f"{used:.1f} of {memory.cuda_total_gib:.1f} GiB of the GPU are in use"
    if used <= bound:
        return Ok(f"{what}, which is within what a driver keeps ({bound:.1f} GiB)")
    processes = facts.gpu_processes
    if processes is None:
        return NotRead(f"the GPU's processes: {what}, and who holds them is not known")
    unknown = [p for p in processes if p.memory_gib is None]
    if unknown:
        return NotRead(f"how much {_names(unknown)} hold: {what}")
    known = sum(p.memory_gib or 0 for p in processes)
    left = used - known
    listed = f"GPU processes hold {known:.1f} GiB ({_names(processes)})" if processes else "no GPU process is listed"
    if left <= bound:
        return Ok(f"{what}; {listed}")
    if facts.os.in_container:
        return Found(
            f"{what}; {listed}; this is a container",
            cause="A program outside this container holds it, or the driver has not given back what a killed one had.",
            fix="sudo fuser -v /dev/nvidia*  # on the host",
        )
    return Found(f"{what}; {listed}")


@check("memory.floor")
def floor(facts: Facts) -> Answer:
    """Row 38: a run that started here would be ended at once."""
    total, available = facts.memory.total_gib, facts.memory.available_gib
    if total is None or available is None:
        return NotRead("MemTotal and MemAvailable")
    bound = default_floor_gib(total)
    seen = f"{available:.1f} of {total:.1f} GiB are available; runs are ended under {bound:.1f} GiB"
    return Found(seen) if available < bound else Ok(seen)


@check("memory.neighbours")
def neighbours(facts: Facts) -> Answer:
    """Row 46: who else holds the GPU's memory."""
    if facts.gpu is None:
        return NotApplicable("no NVIDIA GPU", ReasonClass.GPU)
    if facts.gpu_processes is None:
        return NotRead("the GPU's processes")
    total = facts.memory.total_gib if facts.unified else facts.gpu.memory_total_gib
    if total is None:
        return NotRead("the GPU's memory size")
    holds = sum(p.memory_gib or 0 for p in facts.gpu_processes)
    seen = f"GPU processes: {_names(facts.gpu_processes) or 'none'}; together {holds:.1f} of {total:.1f} GiB"
    return Found(seen) if holds > NEIGHBOUR_FRACTION * total else Ok(seen)


@check("memory.allocator")
def allocator(facts: Facts) -> Answer:
    """Row 40."""
    if not facts.unified:
        return NotApplicable("CPU and GPU do not share one memory pool", _pool_reason(facts))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = facts.env.get(name, "")
        if "expandable_segments:true" in value.lower().replace(" ", ""):
            return Found(f"{name}={value}", fix=f"unset {name}")
    return Ok("expandable_segments is off")


@check("memory.total")
def total(facts: Facts) -> Answer:
    """Row 44: what the machine shows against what its product has."""
    product = LORE.memory.get(facts.os.product or "")
    if product is None:
        return NotApplicable(f"how much {facts.os.product or 'this machine'} should have is not known")
    have = facts.memory.total_gib
    if have is None:
        return NotRead("MemTotal")
    low, high = product.usable_gib
    seen = f"MemTotal is {have:.1f} GiB; {facts.os.product} with 128 GB shows {low:.0f} to {high:.0f}"
    if product.smaller_gib < have < low:
        return Found(f"{seen} (kernel {facts.os.kernel}, driver {facts.driver.version})")
    return Ok(seen)


@check("memory.swap")
def swap(facts: Facts) -> Answer:
    """Rows 38 and 44: swap in use while the GPU shares the pool."""
    if not facts.unified:
        return NotApplicable("CPU and GPU do not share one memory pool", _pool_reason(facts))
    size, free = facts.memory.swap_total_gib, facts.memory.swap_free_gib
    if size is None or free is None:
        return NotRead("SwapTotal and SwapFree")
    used = size - free
    seen = f"{used:.1f} of {size:.1f} GiB of swap are in use"
    return Found(seen) if used > SWAP_GIB else Ok(seen)


def _pool_reason(facts: Facts) -> ReasonClass:
    return ReasonClass.UNIFIED_MEMORY if facts.gpu is not None else ReasonClass.GPU


def _names(processes: list[GpuProcess]) -> str:
    def one(p: GpuProcess) -> str:
        size = f", {p.memory_gib:.1f} GiB" if p.memory_gib is not None else ""
        return f"{p.name or 'process'} {p.pid}{size}"

    return "; ".join(one(p) for p in processes)
