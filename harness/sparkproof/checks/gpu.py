"""Is there a GPU, can torch compute on it, and is it as the kernels expect?

A machine without NVIDIA hardware is no failure of anything here. A failure needs a sign of hardware (PCI bus, kernel
module, device files, NVML) together with a torch that cannot compute on it; which signs agree gives the cause.
"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import LATE, Answer, Found, NotApplicable, NotRead, Ok, check, unanswered
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

KERNEL_SHARED_MEMORY = 101376  # bytes a block: what every kernel configuration is held to
HIDING_VALUES = ("", "-1", "NoDevFiles")
SLOWDOWNS = ("hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "hardware power brake")
NO_HARDWARE = NotApplicable(
    "no NVIDIA GPU: none on the PCI bus, no kernel module, no /dev/nvidia*, none in NVML", ReasonClass.GPU
)
NO_USABLE_GPU = NotApplicable("no GPU that torch can use", ReasonClass.GPU)


@check("gpu.unusable")
def unusable(facts: Facts) -> Answer:
    """Row 14. The first broken link from the bus to torch is named; a mismatch and a CPU build have checks of their
    own."""
    if not facts.has_nvidia_hardware:
        return NO_HARDWARE
    gpu, driver, torch = facts.gpu, facts.driver, facts.torch
    if gpu is not None and gpu.usable_by_torch:
        return Ok(f"torch {torch.version} computed on {gpu.name}")
    visible = facts.env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in HIDING_VALUES:
        return Found(
            f"CUDA_VISIBLE_DEVICES is '{visible}'",
            cause="The variable hides every GPU from this process.",
            fix="unset CUDA_VISIBLE_DEVICES",
        )
    if not driver.wsl and driver.device_files == []:
        return _no_device_files(facts)
    if driver.denied_device_files:
        return Found(
            f"this user may not open {', '.join(driver.denied_device_files)}",
            cause="The device files belong to other users or groups.",
            fix="sudo usermod -aG video,render $USER  # then log in again",
        )
    if _mismatched(facts):
        return NotApplicable("explained by driver.mismatch")
    if torch.version is None:
        if late := unanswered("what torch says about CUDA", torch.error):
            return late
        return Found(
            torch.error or "torch is not installed",
            cause="torch cannot be imported, so nothing can be trained at all.",
            fix="pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    if torch.cuda is None:
        return NotApplicable("explained by torch.cpu_build")
    if torch.cuda_available is None and torch.error is None:
        return NotRead("what torch says about CUDA")
    return _torch_refuses(facts)


def _no_device_files(facts: Facts) -> Found:
    driver = facts.driver
    seen = f"GPU on the PCI bus: {', '.join(driver.pci_devices or []) or 'none seen'}; kernel module: "
    seen += f"{driver.kernel_module_version or 'not loaded'}; no /dev/nvidia*"
    if facts.os.in_container:
        return Found(
            f"{seen}; this is a container",
            cause="The container was started without its GPU.",
            fix="docker run --gpus all ...  # or podman run --device nvidia.com/gpu=all ...",
        )
    if driver.kernel_module_version is None:
        bound = f" (the kernel bound '{driver.pci_driver}' to it)" if driver.pci_driver else ""
        return Found(
            seen,
            cause=f"The NVIDIA driver is not loaded{bound}.",
            fix="sudo modprobe nvidia || { sudo ubuntu-drivers install && sudo reboot; }",
        )
    return Found(
        seen,
        cause="The driver is loaded, but nobody has made its device files yet.",
        fix="sudo nvidia-modprobe -u -c=0",
    )


def _torch_refuses(facts: Facts) -> Found:
    torch, driver = facts.torch, facts.driver
    error = torch.error or "torch.cuda.is_available() is False"
    seen = (
        f"torch {torch.version} for CUDA {torch.cuda}, driver {driver.version or driver.kernel_module_version}: {error}"
    )
    if "too old" in error:
        return Found(
            seen,
            cause=f"The driver serves CUDA {driver.cuda_version or 'of an older version'}; torch needs {torch.cuda}.",
            fix="sudo apt update && sudo apt full-upgrade && sudo reboot",
        )
    if "no kernel image" in error or "not compatible" in error:
        return Found(
            seen,
            cause=f"This torch has no code for the GPU. It was built for: {' '.join(torch.arch_list) or 'not known'}.",
            fix="pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
        )
    if "out of memory" in error.lower():
        return Found(seen, cause="Nothing is left of the GPU's memory for even a small computation.")
    if LATE in error and "imported" in error:
        return Found(
            seen,
            cause="Importing torch alone took longer than that: a slow or full disk, or a machine that is busy.",
            fix="time python -c 'import torch'  # and once more, when its files are in the page cache",
        )
    if LATE in error:
        return Found(seen, cause="The CUDA context is wedged: even a small computation does not come back.")
    return Found(seen)


def _mismatched(facts: Facts) -> bool:
    return any("mismatch" in e for e in facts.driver.nvml_errors.values())


@check("gpu.capability_warning")
def capability_warning(facts: Facts) -> Answer:
    """Row 18: harmless where the computation ran; where it did not, gpu.unusable has the word."""
    gpu = facts.gpu
    if gpu is None or not gpu.usable_by_torch:
        return NO_USABLE_GPU
    said = [w for w in facts.torch.warnings if "cuda capability" in w.lower()]
    if not said:
        return Ok(f"torch started CUDA on {gpu.name} ({gpu.compute_capability}) without such a warning")
    return Found(f"torch said: '{said[0][:300]}', and then computed correctly on {gpu.name}")


@check("gpu.shared_memory")
def shared_memory(facts: Facts) -> Answer:
    """Row 32, from the device's own property."""
    gpu = facts.gpu
    if gpu is None or not gpu.usable_by_torch:
        return NO_USABLE_GPU
    have = gpu.shared_memory_per_block_optin
    if have is None:
        return NotRead("shared_memory_per_block_optin of the device")
    seen = f"{gpu.name} ({gpu.compute_capability}): {have} bytes a block"
    if have < KERNEL_SHARED_MEMORY:
        return Found(f"{seen}, {KERNEL_SHARED_MEMORY} are needed")
    return Ok(f"{seen}; kernels are held to {KERNEL_SHARED_MEMORY}")


@check("gpu.throttled")
def throttled(facts: Facts) -> Answer:
    """Row 50, as far as an idle machine shows it."""
    if not facts.gpus:
        return NO_HARDWARE
    found = []
    for gpu in facts.gpus:
        reasons = [r for r in gpu.throttle_reasons if r in SLOWDOWNS]
        if reasons:
            state = [f"{gpu.temperature_c:.0f} C" if gpu.temperature_c is not None else ""]
            state += [f"{gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz" if gpu.sm_clock_mhz else ""]
            found.append(Found(f"{gpu.name}: {', '.join([*reasons, *filter(None, state)])}"))
    if found:
        return found
    if "init" in facts.driver.nvml_errors or "clock_reasons" in facts.driver.nvml_errors:
        return NotRead("NVML's clock event reasons")
    gpu = facts.gpus[0]
    return Ok(f"{gpu.name}: no slowdown, {gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz, {gpu.temperature_c} C")


@check("gpu.shared_memory_limit")
def shared_memory_limit(facts: Facts) -> Answer:
    """Row 32, by two launches: one that must fit, and one that must be refused without harm."""
    gpu = facts.gpu
    if gpu is None or not gpu.usable_by_torch:
        return NO_USABLE_GPU
    tried = facts.tried.shared_memory
    if tried is None:
        return NotRead("the two kernels, which were not tried")
    if tried.fits_ran is None:
        return NotRead(f"the two kernels: {tried.error or 'no answer'}")
    seen = f"{tried.fits_bytes} of {tried.limit} bytes"
    if not tried.fits_ran:
        if late := unanswered("the two kernels", tried.error):
            return late
        return Found(
            f"a kernel with {seen} did not run right: {tried.error or 'its product is wrong'}",
            severity=Severity.ERROR,
            cause="The device promises that much shared memory a block, and does not give it.",
            fix="TRITON_CACHE_DIR=$(mktemp -d) sparkproof doctor --topic gpu  # once more, with an empty cache",
        )
    if tried.over_raised is None:
        return Found(f"a kernel with {tried.over_bytes} of {tried.limit} bytes was launched and not refused")
    if tried.alive_after is False:
        return Found(
            f"after a kernel with {tried.over_bytes} bytes was refused, the GPU computed no more: {tried.error}",
            cause="The refusal was not a clean one: the CUDA context did not survive it.",
        )
    if "OutOfResources" not in tried.over_raised:
        return Found(f"a kernel with {tried.over_bytes} bytes ended with another error: {tried.over_raised}")
    return Ok(f"{seen} ran and was right; {tried.over_bytes} were refused: {tried.over_raised[:120]}")
