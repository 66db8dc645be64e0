"""Is torch the build that this machine needs?"""

from __future__ import annotations

from sparkproof.checks.gpu import NO_HARDWARE
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass


@check("torch.cpu_build")
def cpu_build(facts: Facts) -> Answer:
    """Row 19. Without an NVIDIA driver a CPU build is the right one, and gpu.unusable speaks of a missing driver."""
    if not facts.has_nvidia_hardware:
        return NO_HARDWARE
    torch, driver = facts.torch, facts.driver
    if torch.version is None:
        if "torch" in facts.packages or facts.torch.error:
            return NotRead("the version of torch")
        return NotApplicable("torch is not installed", ReasonClass.SOFTWARE)
    if torch.cuda is not None:
        return Ok(f"torch {torch.version} was built for CUDA {torch.cuda}")
    if "+rocm" in torch.version or "+xpu" in torch.version:
        return Found(f"torch {torch.version} was built for another maker's GPU", cause="It has no CUDA code at all.")
    if driver.kernel_module_version is None and not driver.wsl and not driver.device_files:
        return NotApplicable("no NVIDIA driver is loaded, so a CUDA build would not help yet")
    beside = driver.kernel_module_version or driver.version or "of unknown version"
    return Found(f"torch {torch.version}, torch.version.cuda is None, beside driver {beside} ({torch.file})")
