"""What is installed or lies ready: native libraries, pins, models, images, servers. Plain data, part of `Facts`."""

from __future__ import annotations

from pydantic import Field

from sparkproof.results import Strict


class Library(Strict):
    """A native library of an installed distribution that does not suit this machine."""

    package: str = Field(description="Distribution it came with, else the top-level name.")
    file: str = Field(description="Path within the import path.")
    machine: str | None = Field(default=None, description="Architecture it was built for, where it is not this one's.")
    needs: list[str] = Field(default_factory=list, description="CUDA libraries it needs, such as 'libcudart.so.12'.")


class Wheels(Strict):
    """The ELF headers of every native library on the import path."""

    scanned: int | None = Field(default=None, description="Libraries that were read; None: the scan was not made.")
    foreign: list[Library] = Field(default_factory=list, description="Built for another architecture.")
    cuda: list[Library] = Field(default_factory=list, description="Those that need CUDA libraries, one a package.")
    cuda_majors_present: list[int] = Field(
        default_factory=list, description="Major versions of libcudart that the loader could find."
    )
    loaded: list[str] = Field(
        default_factory=list, description="CUDA and cuDNN libraries that torch's process really loaded."
    )


class Pins(Strict):
    """Versions that somebody meant to have: pip's constraint file, and a lock in the working folder."""

    constraint_file: str | None = None
    replaced: list[str] = Field(
        default_factory=list, description="Constrained packages with another version, as 'torch: 2.9 for 2.10'."
    )
    lock_file: str | None = None
    locked: int | None = Field(default=None, description="Packages of the lock that are installed.")
    drifted: list[str] = Field(default_factory=list, description="Of those, with another version.")
    missing: list[str] = Field(
        default_factory=list, description="Requirements of installed packages that are not installed at all."
    )
    torchao_minimum: str | None = Field(default=None, description="The torchao that peft asks for in its code.")
    cmake: str | None = Field(default=None, description="Version of the cmake on PATH.")
    cuda_headers: dict[str, bool] = Field(
        default_factory=dict, description="Headers that builds want -> whether the toolkit has them."
    )


class Unsloth(Strict):
    """Unsloth, from its files and by importing it."""

    version: str | None = None
    zoo_version: str | None = None
    disables_fast_inference: bool | None = Field(
        default=None, description="Its loader holds the message that switches fast_inference off on DGX Spark."
    )
    knows_unified_memory: bool | None = Field(
        default=None, description="unsloth_zoo's checkpointing asks whether the GPU is integrated."
    )
    imported: bool | None = Field(default=None, description="`import unsloth` went well; None: not tried.")
    import_error: str | None = None


class Script(Strict):
    """The playbook's script in the working folder, and what the installed trl would say to it."""

    path: str | None = None
    is_web_page: bool | None = None
    sft_arguments: list[str] = Field(default_factory=list, description="Keywords it hands to SFTConfig.")
    unknown_arguments: list[str] | None = Field(
        default=None, description="Of those, what the installed SFTConfig does not take; None: not known."
    )


class Place(Strict):
    """A folder that something is kept in."""

    name: str
    path: str
    in_image: bool | None = Field(default=None, description="It lies in the container's own layer and ends with it.")


class CachedModel(Strict):
    """A model in the hub's cache."""

    repository: str
    model_type: str | None = None
    known: bool | None = Field(default=None, description="The installed transformers knows the type.")
    attention_factor: float | None = Field(default=None, description="rope_scaling's attention_factor, if it has one.")
    wants_kernels: list[str] = Field(
        default_factory=list, description="Packages without which transformers takes a slow path for it."
    )
    truncated: list[str] = Field(
        default_factory=list, description="Files that are shorter than their own header says, or that are missing."
    )


class HubCache(Strict):
    """The Hugging Face cache: what is ready, and what is damaged."""

    path: str | None = None
    models: list[CachedModel] = Field(default_factory=list)
    incomplete: list[str] = Field(default_factory=list, description="Repositories with a download that never ended.")
    kernels: dict[str, list[str]] = Field(
        default_factory=dict, description="Repositories of compiled kernels -> the builds in them."
    )
    token_accepted: bool | None = Field(default=None, description="The hub knows the token; None: not asked.")


class Image(Strict):
    """A container image on this machine."""

    tags: list[str] = Field(default_factory=list)
    digest: str | None = None
    architecture: str | None = None
    created: str | None = Field(default=None, description="Date, YYYY-MM-DD.")


class LlamaCpp(Strict):
    """A llama.cpp that is installed apart from Python."""

    path: str | None = None
    cuda: bool | None = Field(default=None, description="A libggml-cuda lies beside it, or it lists a CUDA device.")


class Ollama(Strict):
    """Ollama, if it is installed."""

    path: str | None = None
    running: list[str] = Field(default_factory=list, description="Models it holds, as 'name size processor'.")
    on_cpu: list[str] = Field(default_factory=list, description="Of those, the ones that are wholly on the CPU.")
    library: str | None = Field(default=None, description="OLLAMA_LLM_LIBRARY of its service or of this shell.")


class History(Strict):
    """What went wrong before."""

    memory_errors: int | None = Field(
        default=None, description="The driver's out-of-memory lines in the kernel log, this boot and the one before."
    )
    xids: list[str] = Field(default_factory=list, description="Xid errors in it, the last few.")
    crashes: int | None = Field(default=None, description="Boots of the last 30 days that no shutdown came before.")
    crash_dates: list[str] = Field(default_factory=list)
