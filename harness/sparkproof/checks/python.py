"""Can this Python build the small C extensions that Triton needs, and is it in order?

Only launching on a GPU needs them (interpreting and compiling ahead of time do not), so without NVIDIA hardware a
missing header or compiler is a warning.
"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts

SHOWN = 5


@check("python.headers")
def headers(facts: Facts) -> Answer:
    """Row 23, first half."""
    python = facts.python
    if python.headers_expected is None:
        return NotRead("where Python.h belongs")
    if python.headers:
        return Ok(f"Python.h is in {python.headers}")
    short = ".".join((python.version or "3").split(".")[:2])
    return Found(
        f"Python {python.version}: {python.headers_expected}/Python.h does not exist",
        severity=_severity(facts),
        fix=f"sudo apt install python{short}-dev",
    )


@check("python.compiler")
def compiler(facts: Facts) -> Answer:
    """Row 23, second half."""
    if facts.compiler.path:
        return Ok(f"{facts.compiler.path}: {facts.compiler.version or 'version not told'}")
    if not facts.compiler.searched:
        return NotRead("whether there is a C compiler")
    return Found("none of $CC, cc, gcc and clang is on PATH", severity=_severity(facts))


@check("python.externally_managed")
def externally_managed(facts: Facts) -> Answer:
    """Row 15, the part that a machine shows beforehand."""
    python = facts.python
    if python.externally_managed is None:
        return NotRead("whether pip may install here")
    if python.externally_managed and not python.virtual_environment:
        return Found(f"{python.executable} is marked as externally managed, and this is no virtual environment")
    return Ok(
        f"{python.executable}: {'a virtual environment' if python.virtual_environment else 'not externally managed'}"
    )


@check("python.requirements")
def requirements(facts: Facts) -> Answer:
    """Row 5."""
    conflicts = facts.python.requirement_conflicts
    if conflicts is None:
        return NotRead("the installed packages' requirements")
    if not facts.packages:
        return NotApplicable("no Python package is installed")
    if not conflicts:
        return Ok(f"{len(facts.packages)} installed packages meet each other's requirements")
    more = f"; and {len(conflicts) - SHOWN} more" if len(conflicts) > SHOWN else ""
    return Found("; ".join(conflicts[:SHOWN]) + more)


def _severity(facts: Facts) -> Severity:
    return Severity.ERROR if facts.has_nvidia_hardware else Severity.WARNING
