"""One wheel, looked into without being installed: its metadata, and what its native libraries were built for.

`deep` reads every library whole. Without it a library larger than `WHOLE` compressed is read only as far as its architecture,
so that nothing of a wheel of half a gigabyte but its directory, its metadata and some headers goes over the wire.
"""

from __future__ import annotations

import email
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from sparkproof.errors import UserError
from sparkproof.facts.elf import machine_of, parse_elf
from sparkproof.facts.fatbin import architectures
from sparkproof.locks.index import File
from sparkproof.locks.lockfile import Pin
from sparkproof.locks.recipe import PYTHON

WHOLE = 1024 * 1024
GLIBC = 39  # Ubuntu 24.04's minor version
HEAD = 64


@dataclass(frozen=True)
class Library:
    """A native library in a wheel; `needed` is None where only its header was read."""

    name: str
    machine: str
    needed: tuple[str, ...] | None


def platform_tags(machine: str = "aarch64") -> list[Tag]:
    """The tags that the image's Python takes on one architecture, best first."""
    version = tuple(int(x) for x in PYTHON.split("."))
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 16, -1)]
    platforms.insert(platforms.index(f"manylinux_2_17_{machine}") + 1, f"manylinux2014_{machine}")
    platforms.append(f"linux_{machine}")
    return [
        *cpython_tags(version, platforms=platforms),
        *compatible_tags(version, "cp" + PYTHON.replace(".", ""), platforms),
    ]


def best(pin: Pin, files: list[File], machine: str = "aarch64") -> File | None:
    """The wheel of a pin that an installer would take, or None. Only files whose hash the lock has are looked at."""
    order = {tag: rank for rank, tag in enumerate(platform_tags(machine))}
    ranked = []
    for file in files:
        try:
            name, version, _, tags = parse_wheel_filename(file.name)
        except InvalidWheelFilename:
            continue
        ranks = [order[t] for t in tags if t in order]
        if name == pin.name and version == pin.version and ranks and file.sha256 in pin.hashes:
            ranked.append((min(ranks), file))
    return min(ranked, key=lambda r: r[0])[1] if ranked else None


class Wheel:
    """An open wheel. Errors: UserError if it is no zip file with metadata."""

    def __init__(self, file: File, stream: BinaryIO) -> None:
        self.file = file
        try:
            self.zip = zipfile.ZipFile(stream)
            self.metadata = email.message_from_bytes(self.read(r"[^/]+\.dist-info/METADATA"))
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{file.name} is no readable wheel: {error}.", "Look at what the index serves.") from error

    def member(self, pattern: str) -> zipfile.ZipInfo | None:
        """The first member whose whole name matches."""
        return next((i for i in self.zip.infolist() if re.fullmatch(pattern, i.filename)), None)

    def read(self, pattern: str) -> bytes:
        """A member's bytes. Errors: KeyError if there is none."""
        found = self.member(pattern)
        if found is None:
            raise KeyError(pattern)
        return self.zip.read(found)

    @property
    def requires(self) -> list[str]:
        """Requires-Dist, as written."""
        return self.metadata.get_all("Requires-Dist") or []

    def libraries(self, deep: bool) -> Iterator[Library]:
        """Each shared library and program, whatever its name: those that start as ELF files do."""
        for info in self.zip.infolist():
            if info.is_dir() or not _may_be_native(info.filename):
                continue
            if deep or info.compress_size <= WHOLE:
                elf = parse_elf(self.zip.read(info))
                if elf is not None:
                    yield Library(info.filename, elf.machine, elf.needed)
            else:
                with self.zip.open(info) as f:
                    machine = machine_of(f.read(HEAD))
                if machine is not None:
                    yield Library(info.filename, machine, None)

    def gpu_code(self, pattern: str) -> tuple[set[int], set[int]]:
        """Architectures with machine code and with PTX in the member. Errors: KeyError if there is none."""
        return architectures(self.read(pattern))


def _may_be_native(name: str) -> bool:
    """Libraries, and files of a program's folder; a quarter of a million headers and scripts are not opened."""
    base = name.rpartition("/")[2]
    return base.endswith(".so") or ".so." in base or "/bin/" in name or name.count(".data/scripts/") == 1
