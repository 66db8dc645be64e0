"""torch, Triton, bitsandbytes, Python and the compilers, as they were read. Plain data, part of `Facts`."""

from __future__ import annotations

from pydantic import Field

from sparkproof.results import Strict


class CudaToolkit(Strict):
    """The CUDA toolkit, if one is installed apart from torch's own libraries."""

    nvcc: str | None = Field(default=None, description="Path of nvcc.")
    version: str | None = None


class Torch(Strict):
    """The torch build that this Python imports."""

    version: str | None = None
    cuda: str | None = Field(default=None, description="CUDA version it was built for; None for a CPU build.")
    arch_list: list[str] = Field(default_factory=list, description="Architectures its kernels were compiled for.")
    file: str | None = None
    cudnn: str | None = None
    cudnn_error: str | None = Field(default=None, description="What torch said when it was asked for cuDNN's version.")
    cuda_available: bool | None = None
    error: str | None = Field(default=None, description="Why it could not be imported, or could not use CUDA.")
    warnings: list[str] = Field(default_factory=list, description="What it warned about while it started CUDA.")


class Ptxas(Strict):
    """One assembler that Triton might call."""

    path: str
    source: str = Field(description="'bundled', 'toolkit', or the environment variable that names it.")
    version: str | None = None
    knows_sm_121a: bool | None = Field(default=None, description="It assembled an empty program for sm_121a.")
    error: str | None = None


class Triton(Strict):
    """Triton, and the assembler it really uses."""

    version: str | None = None
    ptxas: list[Ptxas] = Field(default_factory=list)
    live_ptxas: str | None = Field(default=None, description="Path used for compute capability 10.0 and later.")
    live_variable: str | None = Field(
        default=None, description="Environment variable that redirects it there, found by trying each with a decoy."
    )
    variables: dict[str, str] = Field(default_factory=dict, description="TRITON_PTXAS* variables that are set.")
    error: str | None = None


class Bitsandbytes(Strict):
    """bitsandbytes, read from its files."""

    version: str | None = None
    libraries: list[str] = Field(
        default_factory=list, description="Native libraries it ships, such as 'cuda130' or 'cpu'."
    )
    repacks_on_avx512_bf16: bool | None = Field(
        default=None, description="Its Linear4bit repacks weights in place on CPUs with AVX512-BF16."
    )


class Python(Strict):
    """The Python that would train."""

    version: str | None = None
    executable: str | None = None
    headers: str | None = Field(default=None, description="Folder that holds Python.h; None when it is missing.")
    headers_expected: str | None = Field(default=None, description="Folder where Python.h belongs; None: not read.")
    externally_managed: bool | None = Field(default=None, description="pip refuses to install here (PEP 668).")
    virtual_environment: bool | None = None
    ensurepip: bool | None = Field(default=None, description="`python -m venv` can put pip in; None: not read.")
    requirement_conflicts: list[str] | None = Field(
        default=None, description="Installed distributions whose stated requirements are not met."
    )


class Compiler(Strict):
    """The C compiler that Triton builds its launchers with."""

    path: str | None = None
    version: str | None = None
    searched: bool = Field(default=False, description="A search was made, so an empty path means there is none.")
