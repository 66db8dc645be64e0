"""Is torch the build that this machine needs?"""

from __future__ import annotations

from sparkproof.checks.gpu import NO_HARDWARE
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check, unanswered
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


@check("torch.vision")
def vision(facts: Facts) -> Answer:
    """Row 21, by calling nms: torchvision built for another torch registers no operators."""
    if "torchvision" not in facts.packages:
        return NotApplicable("torchvision is not installed")
    tried = next((e for e in facts.tried.extensions if e.name == "torchvision"), None)
    if tried is None:
        return NotRead("whether torchvision's operators work")
    version = facts.packages["torchvision"]
    if late := unanswered("whether torchvision's operators work", tried.error):
        return late
    if tried.error:
        return Found(f"torchvision {version} beside torch {facts.torch.version}: {tried.error}")
    return Ok(f"torchvision {version}: nms kept the boxes that it should")


@check("torch.replaced")
def replaced(facts: Facts) -> Answer:
    """Rows 21 and 28: an image that pins its own torch, and another in its place."""
    pins = facts.pins
    if pins.constraint_file is None:
        return NotApplicable("no pip constraint says which versions belong here")
    if pins.replaced:
        return Found(f"{'; '.join(pins.replaced[:5])} ({pins.constraint_file})")
    return Ok(f"what {pins.constraint_file} pins is what is installed")


@check("torch.cudnn")
def cudnn(facts: Facts) -> Answer:
    """Row 22: torch's own comparison, a convolution, and where the loader found the library."""
    torch, tried = facts.torch, facts.tried
    if torch.cuda is None:
        return NotApplicable("torch was built without CUDA, so without cuDNN", ReasonClass.SOFTWARE)
    path = facts.env.get("LD_LIBRARY_PATH")
    where = f"; LD_LIBRARY_PATH={path}" if path else ""
    loaded = [p for p in facts.wheels.loaded if "/libcudnn" in p]
    if torch.cudnn_error:
        return Found(f"{torch.cudnn_error}{where}")
    if tried.convolution is False:
        return Found(
            f"a small convolution: {tried.convolution_error}{where}",
            fix="unset LD_LIBRARY_PATH" if path else "pip install --force-reinstall torch",
        )
    if torch.cudnn is None:
        return NotRead("cuDNN's version")
    if tried.convolution is None and facts.gpu is not None and facts.gpu.usable_by_torch:
        return NotRead("a convolution, which was not tried")
    return Ok(f"cuDNN {torch.cudnn}{f' from {loaded[0]}' if loaded else ''}")
