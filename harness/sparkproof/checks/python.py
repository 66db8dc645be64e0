"""Can this Python build the small C extensions that Triton needs, and is it in order?

Only launching on a GPU needs them (interpreting and compiling ahead of time do not), so without NVIDIA hardware a
missing header or compiler is a warning.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

SHOWN = 5
TRAINERS = ("unsloth", "trl ", "peft ", "transformers ")  # what they ask for is told first


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
    first = sorted(conflicts, key=lambda c: not c.startswith(TRAINERS))
    more = f"; and {len(conflicts) - SHOWN} more" if len(conflicts) > SHOWN else ""
    return Found("; ".join(first[:SHOWN]) + more)


@check("python.venv")
def venv(facts: Facts) -> Answer:
    """Row 23, last half: `python3 -m venv` needs a package of its own on Debian and Ubuntu."""
    python = facts.python
    if python.ensurepip is None:
        return NotRead("whether virtual environments can be made")
    if python.virtual_environment:
        return Ok(f"{python.executable} is in a virtual environment already")
    if python.ensurepip:
        return Ok(f"{python.executable} can make virtual environments")
    short = ".".join((python.version or "3").split(".")[:2])
    return Found(f"{python.executable} has no ensurepip", fix=f"sudo apt install python{short}-venv")


@check("python.torchao")
def torchao(facts: Facts) -> Answer:
    """Row 6."""
    have, want = facts.packages.get("torchao"), facts.pins.torchao_minimum
    if "peft" not in facts.packages:
        return NotApplicable("peft is not installed", ReasonClass.SOFTWARE)
    if have is None:
        return Ok("torchao is not installed, so peft does not look at it")
    if want is None:
        return NotRead("which torchao peft asks for")
    seen = f"torchao {have}; peft {facts.packages['peft']} asks for {want} or newer"
    try:
        return Found(seen) if Version(have).release < Version(want).release else Ok(seen)
    except InvalidVersion:
        return NotRead(f"the version of torchao ({have})")


@check("python.lock")
def lock(facts: Facts) -> Answer:
    """Row 7: the lock in the working folder against what is installed."""
    pins = facts.pins
    if pins.lock_file is None:
        return NotApplicable("there is no lock in the working folder")
    if pins.drifted:
        more = f"; and {len(pins.drifted) - SHOWN} more" if len(pins.drifted) > SHOWN else ""
        return Found(
            f"{len(pins.drifted)} of {pins.locked}: {'; '.join(pins.drifted[:SHOWN])}{more} ({pins.lock_file})",
            fix=f"pip install --require-hashes -r {pins.lock_file}",
        )
    return Ok(f"all {pins.locked} installed packages of {pins.lock_file} have its versions")


def _severity(facts: Facts) -> Severity:
    return Severity.ERROR if facts.has_nvidia_hardware else Severity.WARNING
