"""What a launch configuration may know of a device: numbers, never a name.

A GB10 has 48 SMs and 101376 bytes of shared memory a block; its siblings have 40, and another cc 12.1 part shares its
compute capability with fewer of either. So the heuristics take the properties that were read from the driver.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceProperties:
    """The properties that launch heuristics use."""

    sm_count: int
    shared_memory_per_block: int  # most a block may opt in to, bytes
    threads_per_sm: int
    l2_bytes: int
    capability: int  # 10 * major + minor; 0 is the interpreter's

    @property
    def sm_10x(self) -> bool:
        """Whether it is a Blackwell with tensor memory, whose compiler spills elsewhere than others'."""
        return self.capability // 10 == 10

    @classmethod
    def of(cls, device: torch.device) -> DeviceProperties:
        """Properties of a CUDA device; for a CPU tensor those of the interpreter's imaginary device."""
        if device.type != "cuda":
            return INTERPRETER
        return _read(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _read(index: int) -> DeviceProperties:
    p: Any = torch.cuda.get_device_properties(index)
    return DeviceProperties(
        sm_count=p.multi_processor_count,
        shared_memory_per_block=p.shared_memory_per_block_optin,
        threads_per_sm=p.max_threads_per_multi_processor,
        l2_bytes=p.L2_cache_size,
        capability=10 * p.major + p.minor,
    )


# One SM that holds one block: small inputs then reach the paths where a program works through many rows.
INTERPRETER = DeviceProperties(sm_count=1, shared_memory_per_block=101376, threads_per_sm=32, l2_bytes=0, capability=0)
# The smallest device the heuristics must fit; the ahead-of-time gate compiles for it.
SPARK = DeviceProperties(
    sm_count=48, shared_memory_per_block=101376, threads_per_sm=1536, l2_bytes=24 * 2**20, capability=121
)
