"""Do the two halves of the NVIDIA driver fit together?"""

from __future__ import annotations

from sparkproof.checks.gpu import NO_HARDWARE
from sparkproof.checks.lore import LORE
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts


@check("driver.mismatch")
def mismatch(facts: Facts) -> Answer:
    """Row 51: both versions known and different, or NVML's own words."""
    if not facts.has_nvidia_hardware:
        return NO_HARDWARE
    driver = facts.driver
    module, library = driver.kernel_module_version, driver.version
    complaint = next((e for e in driver.nvml_errors.values() if "mismatch" in e.lower()), None)
    if complaint:
        return Found(f"NVML: {complaint}; loaded kernel module: {module or 'unknown'}")
    if module is None or library is None:
        missing = "kernel module" if module is None else "library"
        return NotApplicable(f"the version of the {missing} is not to be had, so there is nothing to compare")
    if module != library:
        return Found(f"kernel module {module}, library {library}")
    return Ok(f"kernel module and library are both {module}")


@check("driver.known_bad")
def known_bad(facts: Facts) -> Answer:
    """Rows 44 and 51: versions with reports against them. Lore, since only months of use would show it."""
    if not facts.has_nvidia_hardware:
        return NO_HARDWARE
    kernel = facts.os.kernel
    driver = facts.driver.kernel_module_version or facts.driver.version
    if kernel is None and driver is None:
        return NotRead("the versions of kernel and driver")
    found = [
        Found(f"kernel {kernel}: {bad.says}", fix="apt list --installed 'linux-image-*'  # boot another one of them")
        for bad in LORE.bad_kernel
        if kernel and facts.is_target and _begins(kernel, bad.version)
    ]
    found += [
        Found(f"driver {driver}: {bad.says}") for bad in LORE.bad_driver if driver and driver.startswith(bad.version)
    ]
    return found or Ok(f"no report against kernel {kernel or 'unknown'} and driver {driver or 'unknown'} is known here")


@check("driver.kernel_log")
def kernel_log(facts: Facts) -> Answer:
    """Rows 38 and 39: what the driver wrote before the host froze, or while a training loop ran."""
    if not facts.has_nvidia_hardware:
        return NO_HARDWARE
    past = facts.history
    if past.memory_errors is None:
        if facts.os.in_container:
            return NotApplicable("this is a container, which does not see the kernel's log")
        return NotRead("the kernel's log, which this user may not see: sudo usermod -aG adm $USER")
    xids = f"; {', '.join(past.xids)}" if past.xids else ""
    if past.memory_errors:
        return Found(f"{past.memory_errors} lines with NV_ERR_NO_MEMORY in this boot and the one before{xids}")
    if past.xids:
        return Found(
            f"{', '.join(past.xids)} in this boot and the one before",
            cause="The driver reported errors of the GPU; their numbers are explained in NVIDIA's list of Xid errors.",
            fix="journalctl -k --no-pager -g 'NVRM: Xid'",
        )
    return Ok("no NV_ERR_NO_MEMORY and no Xid in this boot and the one before")


def _begins(version: str, bad: str) -> bool:
    """'6.17.0-1008-nvidia' begins with '6.17.0-1008'; '6.17.0-10081' does not."""
    return version == bad or version.startswith(f"{bad}-") or version.startswith(f"{bad}.")
