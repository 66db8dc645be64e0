"""What an architecture allows a kernel: the limits of the ahead-of-time gate.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; GB10's 48 SMs and 99 KiB
opt-in shared memory as cudaDeviceProp reports them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparktune.ops.device import SPARK, DeviceProperties


@dataclass(frozen=True)
class Target:
    """One architecture: what its compiler is told, and what a block may use."""

    name: str
    capability: int  # as Triton names it: 121
    shared_limit: int  # bytes a block may opt in to
    registers_limit: int = 255  # a thread
    registers_block: int = 65536  # a block
    spills_limit: int = 0  # bytes stored and loaded
    device: DeviceProperties = SPARK  # heuristics are asked for this one; the smallest is the strictest


TARGETS = {
    t.name: t
    for t in (
        Target("sm_90", 90, 232448, device=DeviceProperties(132, 232448, 2048, 50 * 2**20, 90)),
        Target("sm_100", 100, 232448, device=DeviceProperties(148, 232448, 2048, 126 * 2**20, 100)),
        Target("sm_120", 120, 101376, device=DeviceProperties(84, 101376, 1536, 48 * 2**20, 120)),
        Target("sm_121", 121, 101376),
    )
}
