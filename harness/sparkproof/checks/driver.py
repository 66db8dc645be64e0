"""Do the two halves of the NVIDIA driver fit together?"""

from __future__ import annotations

from sparkproof.checks.gpu import NO_HARDWARE
from sparkproof.checks.registry import Answer, Found, NotApplicable, Ok, check
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
