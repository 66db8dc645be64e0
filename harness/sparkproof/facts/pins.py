"""What versions were meant: pip's constraint file, a lock in the working folder, what peft's code asks for; and the
tools that building from source needs."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from sparkproof.facts.host import Host
from sparkproof.facts.installed import Pins
from sparkproof.facts.software import package_folder, required

TOOL_TIMEOUT_S = 5
LOCKS = ("requirements/lock.txt", "requirements.lock", "requirements-lock.txt")
HEADERS = ("nvtx3/nvToolsExt.h", "cuda_profiler_api.h", "cuda_runtime.h")
TORCHAO_MINIMUM = re.compile(r"TORCHAO_MINIMUM_VERSION\s*=\s*[\w.]*parse\(\s*[\"']([\d.]+)[\"']\)")


def read_pins(host: Host, packages: dict[str, str], nvcc: str | None, folder: Path | None = None) -> Pins:
    """Everything that says which versions should be here, held against `packages`."""
    pins = Pins(missing=missing(packages))
    constraint = host.environ.get("PIP_CONSTRAINT", "").split(" ")[0] or "/etc/pip/constraint.txt"
    text = host.text(constraint)
    if text is not None:
        pins.constraint_file = constraint
        _, pins.replaced = differing(text, packages, exact=True)
    here = folder or Path.cwd()
    lock = next((here / name for name in LOCKS if (here / name).is_file()), None)
    if lock is not None:
        pins.lock_file = str(lock)
        pins.locked, pins.drifted = differing(lock.read_text(encoding="utf-8", errors="replace"), packages)
    pins.torchao_minimum = torchao_minimum()
    cmake = host.which("cmake")
    if cmake:
        said = re.search(r"version (\d+\.\d+[\d.]*)", host.run([cmake, "--version"], TOOL_TIMEOUT_S).out)
        pins.cmake = said.group(1) if said else None
    if nvcc:
        # nvcc on PATH is often a link, or a script that calls another
        homes = [host.path(nvcc).resolve().parent.parent, host.path("/usr/local/cuda")]
        homes += [Path(host.environ["CUDA_HOME"])] if host.environ.get("CUDA_HOME") else []
        pins.cuda_headers = {name: any((home / "include" / name).exists() for home in homes) for name in HEADERS}
    return pins


def differing(text: str, packages: dict[str, str], exact: bool = False) -> tuple[int, list[str]]:
    """How many `name==version` lines are installed, and those with another version: 'torch: 2.9 for 2.10'.

    Hashes, comments and lines whose marker does not hold here are passed over. Without `exact` a local part
    (+cu130) is not compared, since an index chooses it.
    """
    count, found = 0, []
    for line in text.replace("\\\n", " ").splitlines():
        spec = line.split(" --hash")[0].split(" #")[0].strip()
        try:
            wanted = Requirement(spec)
        except InvalidRequirement:
            continue
        pin = next((s.version for s in wanted.specifier if s.operator == "=="), None)
        have = packages.get(canonicalize_name(wanted.name))
        if pin is None or have is None or (wanted.marker and not wanted.marker.evaluate(default_environment() | {})):  # type: ignore[arg-type]
            continue
        count += 1
        if not same(have, pin, exact):
            found.append(f"{wanted.name}: {have} for {pin}")
    return count, sorted(found)


def same(have: str, want: str, exact: bool) -> bool:
    """Whether two versions are one, with or without the local part."""
    try:
        a, b = Version(have), Version(want)
    except InvalidVersion:
        return have == want
    return a == b if exact else a.public == b.public


def missing(packages: dict[str, str]) -> list[str]:
    """Stated requirements (markers applied, extras left out) that are not installed at all: 'x needs y==1'."""
    found = []
    for name in packages:
        for r in required(name):
            if canonicalize_name(r.name) not in packages:
                found.append(f"{name} needs {r.name}{r.specifier}")
    return sorted(found)


def torchao_minimum() -> str | None:
    """The oldest torchao that the installed peft accepts, from its text: importing it would import torch."""
    folder = package_folder("peft")
    source = folder / "import_utils.py" if folder else None
    if source is None or not source.exists():
        return None
    found = TORCHAO_MINIMUM.search(source.read_text(encoding="utf-8", errors="replace"))
    return found.group(1) if found else None
