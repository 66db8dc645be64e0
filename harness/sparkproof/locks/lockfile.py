"""A hash lock, read: which version of what, for whom, and which files of it may be used."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sparkproof.errors import UserError
from sparkproof.locks.recipe import PYTHON

HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
ADDRESS = re.compile(r"https?://|--(?:index-url|extra-index-url|find-links)")


@dataclass(frozen=True)
class Pin:
    """`name` is normalised; `hashes` are sha256 in hex."""

    name: str
    version: Version
    marker: Marker | None = None
    hashes: frozenset[str] = field(default_factory=frozenset)


def environment(machine: str = "aarch64") -> dict[str, str]:
    """The marker environment of the image's Python on one architecture, whatever this machine is."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{PYTHON}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{PYTHON}.0",
        "platform_python_implementation": "CPython",
        "python_version": PYTHON,
        "sys_platform": "linux",
        "extra": "",
    }


def read_lock(path: Path) -> list[Pin]:
    """Every pin of a lock. Errors: UserError for a line that is no exact pin, has no hash, or names an index's address."""
    if not path.is_file():
        raise UserError(f"{path} is missing.", "make lock-image")
    text = path.read_text(encoding="utf-8")
    pins = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if ADDRESS.search(line):
            raise UserError(f"{path.name} names an index: {line[:80]!r}.", "A lock holds no address: make lock-image")
        spec = line.split(" --hash")[0].strip()
        try:
            wanted = Requirement(spec)
        except ValueError as error:
            raise UserError(f"{path.name}: {spec!r} is no requirement.", "make lock-image") from error
        exact = [s.version for s in wanted.specifier if s.operator == "=="]
        hashes = frozenset(HASH.findall(line))
        if len(exact) != 1 or not hashes:
            raise UserError(f"{path.name}: {spec!r} is not an exact pin with a hash.", "make lock-image")
        pins.append(Pin(canonicalize_name(wanted.name), Version(exact[0]), wanted.marker, hashes))
    return pins


def on(pins: list[Pin], machine: str) -> dict[str, Pin]:
    """The pins that hold on one architecture, by name. Errors: UserError if one package has two versions there."""
    found: dict[str, Pin] = {}
    for pin in pins:
        if pin.marker is None or pin.marker.evaluate(environment(machine)):
            if pin.name in found:
                raise UserError(
                    f"The lock has {pin.name} {found[pin.name].version} and {pin.version} on {machine}.",
                    "make lock-image",
                )
            found[pin.name] = pin
    return found
