"""What was tried rather than looked up: compiled, quantised, attended, timed. Each in a process of its own.

A part that was not tried (no GPU, a package that is not there, a child that died before it) is None, and `Facts.errors`
or the part's own `error` says why.
"""

from __future__ import annotations

from pydantic import Field

from sparkproof.results import Strict


class Compilation(Strict):
    """One small Triton kernel, compiled ahead of time for compute capability 12.1; no GPU is needed."""

    target: str | None = Field(default=None, description="The .target of its PTX, such as 'sm_121a'.")
    cold_s: float | None = Field(default=None, description="Seconds with an empty cache.")
    warm_s: float | None = Field(default=None, description="Seconds in a second process with that cache.")
    cold_binary: str | None = Field(default=None, description="SHA-256 of the machine code, cold.")
    warm_binary: str | None = Field(default=None, description="The same from the cache.")
    again_binary: str | None = Field(default=None, description="The same, compiled anew with another empty cache.")
    live_variables: list[str] | None = Field(
        default=None, description="Variables whose redirection to a ptxas that always fails made the compilation fail."
    )
    fp4: bool | None = Field(default=None, description="The live ptxas assembles an FP4 conversion for that target.")
    error: str | None = None


class FourBit(Strict):
    """bitsandbytes: NF4 of one matrix and back, and a layer's product with it."""

    device: str
    parameter: str | None = Field(default=None, description="Type name of a Linear4bit's weight.")
    has_statistics: bool | None = Field(default=None, description="The weight has compress_statistics (row 4).")
    relative_error: float | None = Field(default=None, description="Of dequantised values, relative L2; about 0.1.")
    product_error: float | None = Field(
        default=None, description="Of the layer's output against the dequantised product, relative L2."
    )
    error: str | None = None


class Attention(Strict):
    """One backend of scaled_dot_product_attention, one dtype, head size and direction, against float64 on the CPU."""

    backend: str = Field(description="flash, efficient, cudnn, math, flash_attn, xformers or flex.")
    dtype: str
    head_size: int
    direction: str = Field(description="'forward' or 'backward'.")
    error: float | None = Field(default=None, description="Relative L2; None where it did not run.")
    refused: str | None = Field(default=None, description="Why it did not run.")


class SharedMemory(Strict):
    """Two Triton kernels: the largest pipeline that fits into a block's shared memory, and the next larger one."""

    limit: int = Field(description="Bytes a block may ask for.")
    fits_bytes: int | None = None
    fits_ran: bool | None = Field(default=None, description="It ran, and its product was right.")
    over_bytes: int | None = None
    over_raised: str | None = Field(default=None, description="Exception that the larger one ended with; None: it ran.")
    alive_after: bool | None = Field(default=None, description="The GPU computed correctly after the refusal.")
    error: str | None = None


class Canaries(Strict):
    """Three short timings and the clock during them."""

    copy_gb_s: float | None = Field(default=None, description="Device copy, bytes read plus written, GB/s (1e9).")
    gemv_gb_s: float | None = Field(default=None, description="bf16 matrix times vector, bytes of the matrix, GB/s.")
    gemm_tflops: float | None = Field(default=None, description="bf16 matrix product, TFLOP/s.")
    load_s: float | None = Field(default=None, description="Seconds under load when the clock was read.")
    load_clock_mhz: int | None = Field(default=None, description="Median SM clock under load.")
    load_power_w: float | None = None
    load_temperature_c: float | None = None
    load_throttle_reasons: list[str] = Field(default_factory=list)
    error: str | None = None


class Extension(Strict):
    """A compiled extension that was imported and called."""

    name: str
    version: str | None = None
    error: str | None = Field(default=None, description="None: it imported, and its call gave what it should.")


class Tried(Strict):
    """Everything that was tried."""

    compilation: Compilation | None = None
    four_bit: list[FourBit] = Field(default_factory=list)
    attention: list[Attention] | None = None
    shared_memory: SharedMemory | None = None
    canaries: Canaries | None = None
    extensions: list[Extension] = Field(default_factory=list)
    convolution_error: str | None = Field(default=None, description="What cuDNN said to a small convolution.")
    convolution: bool | None = Field(default=None, description="A small convolution on the GPU was right.")
