"""What a device can do at best, as a plan needs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device in a process that does nothing else.

    gemm: bf16 products of a layer's size, flops a second. copy: bytes read and written a second. attention: flops a second of
    causal attention forward and backward. memory: bytes that a process may allocate. sms: multiprocessors. `source` says whether
    these are measurements. to_host: bytes a second to pinned memory of the host, 0 where the device shares that.
    """

    name: str
    gemm: float
    copy: float
    attention_forward: float
    attention_backward: float
    memory: float
    sms: int
    source: str
    measured: bool
    to_host: float = 0.0

    def __post_init__(self) -> None:
        if min(self.gemm, self.copy, self.attention_forward, self.attention_backward, self.memory) <= 0:
            raise ValueError(f"ceilings of {self.name} must all be above 0")


# 4096 x 4096 x 4096 tokens' products of Llama-3.1-8B at 4096 tokens: q 0.203 ms, gate and up 1.382, down 0.738, that is 677 to
# 697 TFLOP/s; copy 2.89 TB/s; cuDNN's attention over 2 x 2048 tokens 0.165 ms forward, 0.529 backward. Copies to the host are an
# H200's, 54.9 GB/s over the same PCIe 5.
H100 = Ceilings(
    "H100 80GB", 685e12, 2.89e12, 417e12, 325e12, 79.1e9, 132, "measured on one H100 80GB (torch 2.11, CUDA 13.0)", True,
    54.9e9,
)  # fmt: skip
# Nobody of the project has measured one: NVIDIA's 100 TFLOP/s dense bf16 and 273 GB/s, with the shares of them that products
# and copies reach elsewhere (88% and 85%), and FlashAttention at 60 and 50 TFLOP/s.
GB10 = Ceilings(
    "GB10 (DGX Spark)",
    88e12,
    232e9,
    60e12,
    50e12,
    119e9,
    48,
    "nominal figures, and shares of them assumed; not measured",
    False,
)
DEVICES = {"h100": H100, "gb10": GB10}
