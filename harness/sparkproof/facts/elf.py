"""As much of an ELF file as says where it can run: its architecture, and the libraries it needs. Nothing is executed.

Layout: System V ABI, ELF-64 header, program headers and dynamic section.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5
LONGEST_NAME = 256
MOST_ENTRIES = 10_000  # a damaged size must not be walked to its end


@dataclass(frozen=True)
class Elf:
    """Architecture as `uname -m` calls it (or 'ELF machine N'), and the DT_NEEDED names in order."""

    machine: str
    needed: tuple[str, ...]


def read_elf(path: Path) -> Elf | None:
    """Headers of a 64-bit little-endian ELF file; None for anything else, a torn file included."""
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse_elf(data)
    except (OSError, ValueError):  # mmap refuses an empty file
        return None


def parse_elf(data: bytes | mmap.mmap) -> Elf | None:
    """The same of a file's bytes."""
    try:
        return _parse(data)
    except (ValueError, OverflowError, struct.error):
        return None


def machine_of(head: bytes) -> str | None:
    """The architecture, from a file's first 20 bytes; None if it is no 64-bit little-endian ELF file."""
    if len(head) < 20 or head[:6] != b"\x7fELF\x02\x01":
        return None
    (machine,) = struct.unpack_from("<H", head, 18)
    return MACHINES.get(machine, f"ELF machine {machine}")


def _parse(data: bytes | mmap.mmap) -> Elf | None:
    machine = machine_of(data[:20])
    if machine is None:
        return None
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    loads = [(h[3], h[2], h[5]) for h in headers if h[0] == PT_LOAD]  # address, place in the file, size there
    needed: tuple[str, ...] = ()
    for kind, _, place, _, _, length in headers:
        if kind == PT_DYNAMIC:
            needed = _needed(data, place, length, loads)
    return Elf(machine, needed)


def _needed(data: bytes | mmap.mmap, place: int, length: int, loads: list[tuple[int, int, int]]) -> tuple[str, ...]:
    names, table = [], None
    for at in range(place, place + min(length, 16 * MOST_ENTRIES), 16):
        tag, value = struct.unpack_from("<qQ", data, at)
        if tag == DT_NULL:
            break
        if tag == DT_NEEDED:
            names.append(value)
        elif tag == DT_STRTAB:
            table = next((p + value - a for a, p, n in loads if a <= value < a + n), None)
    if table is None:
        return ()
    found = []
    for name in names:
        start = table + name
        end = data.find(b"\0", start, start + LONGEST_NAME)
        found.append(data[start:end].decode("utf-8", errors="replace"))
    return tuple(found)
