"""For which GPUs a library carries machine code: the entries of the fat binaries inside it, without NVIDIA's tools.

A fat binary starts with a magic number, its header's size and its own size; entries follow, each with its kind (1 is PTX, 2 is
machine code), its header's size, its payload's size, and the architecture as a number (121 for sm_121). Those headers
are plain even where the payload is compressed.
"""

from __future__ import annotations

import struct

MAGIC = b"\x50\xed\x55\xba"
PTX, MACHINE_CODE = 1, 2
SMALLEST_HEADER, LARGEST_HEADER = 32, 4096
HIGHEST = 2000  # no architecture has a number near it; a damaged entry may


def architectures(data: bytes) -> tuple[set[int], set[int]]:
    """Numbers of the architectures with machine code, and with PTX. A torn entry ends its fat binary."""
    code: set[int] = set()
    ptx: set[int] = set()
    at = data.find(MAGIC)
    while at >= 0:
        end = at + 4
        if at + 16 <= len(data):
            header, size = struct.unpack_from("<HQ", data, at + 6)
            if header >= 16:
                end = max(end, _entries(data, at + header, min(at + header + size, len(data)), code, ptx))
        at = data.find(MAGIC, end)
    return code, ptx


def _entries(data: bytes, at: int, end: int, code: set[int], ptx: set[int]) -> int:
    while at + SMALLEST_HEADER <= end:
        kind, header, size = struct.unpack_from("<HxxIQ", data, at)
        (number,) = struct.unpack_from("<I", data, at + 28)
        if kind not in (PTX, MACHINE_CODE) or not SMALLEST_HEADER <= header <= LARGEST_HEADER or number > HIGHEST:
            break
        (code if kind == MACHINE_CODE else ptx).add(number)
        at += header + size
    return at
