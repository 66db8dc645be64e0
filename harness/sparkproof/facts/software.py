"""Installed Python distributions, Python itself, the C compiler, and what bitsandbytes ships."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from sparkproof.facts.host import Host
from sparkproof.facts.toolchain import Bitsandbytes, Compiler, Python

COMPILER_TIMEOUT_S = 5


def read_packages() -> dict[str, str]:
    """Normalised name -> version; the first on the import path wins, as it does for import."""
    found: dict[str, str] = {}
    for d in importlib.metadata.distributions():
        name = d.metadata["Name"] if d.metadata else None
        if name:
            found.setdefault(canonicalize_name(name), d.version or "unknown")
    return dict(sorted(found.items()))


def read_conflicts(packages: dict[str, str]) -> list[str]:
    """Stated requirements (markers applied, extras left out) that the installed versions do not meet.

    What is not installed at all is left out: that shows at once, on import, while a wrong version shows late.
    """
    conflicts = []
    for name, version in packages.items():
        for r in required(name):
            have = packages.get(canonicalize_name(r.name))
            if have not in (None, "unknown") and not r.specifier.contains(have, prereleases=True):
                conflicts.append(f"{name} {version} needs {r.name}{r.specifier}, but {have} is installed")
    return sorted(conflicts)


def required(name: str) -> list[Requirement]:
    """The stated requirements of an installed distribution that hold here, extras left out."""
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for text in texts:
        try:
            r = Requirement(text)
        except InvalidRequirement:
            continue
        if r.marker is None or r.marker.evaluate({"extra": ""}):
            found.append(r)
    return found


def package_folder(distribution: str, package: str | None = None) -> Path | None:
    """Folder of an installed package, without importing it."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(found.locate_file(package or distribution)))
    return folder if folder.is_dir() else None


def read_python(host: Host, packages: dict[str, str]) -> Python:
    """Version, headers for building extensions, and whether pip may install here."""
    expected = sysconfig.get_paths()["include"]
    in_venv = sys.prefix != sys.base_prefix
    marker = Path(sysconfig.get_path("stdlib", sysconfig.get_default_scheme())) / "EXTERNALLY-MANAGED"
    return Python(
        version=sys.version.split()[0],
        executable=sys.executable,
        headers=expected if host.exists(f"{expected}/Python.h") else None,
        headers_expected=expected,
        externally_managed=not in_venv and marker.exists(),
        virtual_environment=in_venv,
        ensurepip=importlib.util.find_spec("ensurepip") is not None,
        requirement_conflicts=read_conflicts(packages) if packages else None,
    )


def read_compiler(host: Host) -> Compiler:
    """$CC, else the first of cc, gcc, clang."""
    chosen = host.environ.get("CC", "").split()[:1] or ["cc", "gcc", "clang"]
    path = next((p for p in map(host.which, chosen) if p), None)
    if path is None:
        return Compiler(searched=True)
    lines = host.run([path, "--version"], COMPILER_TIMEOUT_S).out.splitlines()
    return Compiler(path=path, version=lines[0] if lines else None, searched=True)


def read_bitsandbytes(packages: dict[str, str]) -> Bitsandbytes:
    """Its files alone: importing it would import torch."""
    version = packages.get("bitsandbytes")
    if version is None:
        return Bitsandbytes()
    root = Path(str(importlib.metadata.distribution("bitsandbytes").locate_file("bitsandbytes")))
    libraries = [
        m.group(1)
        for p in sorted(root.glob("libbitsandbytes_*"))
        if (m := re.match(r"libbitsandbytes_(\w+)\.", p.name))
    ]
    source = root / "nn" / "modules.py"
    repacks = "has_avx512bf16" in source.read_text(encoding="utf-8") if source.exists() else None
    return Bitsandbytes(version=version, libraries=libraries, repacks_on_avx512_bf16=repacks)
