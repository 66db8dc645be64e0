"""What is known of a machine: plain data, made once by `collect`, saved, replayed and judged anywhere.

Every field that a probe may fail to read is optional. `None` means "not read", never "no"; `Facts.errors` says why.
Sizes are in GiB (2**30 bytes) unless the name says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparkproof.facts.fabric import Fabric
from sparkproof.facts.installed import History, HubCache, Image, LlamaCpp, Ollama, Pins, Place, Script, Unsloth, Wheels
from sparkproof.facts.place import RunsIn
from sparkproof.facts.toolchain import Bitsandbytes, Compiler, CudaToolkit, Python, Torch, Triton
from sparkproof.facts.tried import Tried
from sparkproof.results import Strict

SCHEMA_VERSION = 1
UNLIMITED = -1
TARGET_COMPUTE_CAPABILITY = (12, 1)


class Os(Strict):
    """The operating system, and whether this is a container on it."""

    name: str | None = Field(default=None, description="ID of /etc/os-release, such as 'ubuntu'.")
    version: str | None = Field(default=None, description="PRETTY_NAME of /etc/os-release.")
    kernel: str | None = Field(default=None, description="uname -r; the host's, also in a container.")
    in_container: bool | None = None
    product: str | None = Field(default=None, description="DMI product name, such as 'NVIDIA_DGX_Spark'.")
    dgx_release: str | None = Field(default=None, description="DGX OS version of /etc/dgx-release.")


class Cpu(Strict):
    """The processor."""

    model: str | None = None
    cores: int | None = Field(default=None, description="Logical cores this process may use.")
    avx512_bf16: bool | None = Field(default=None, description="The CPU has AVX512-BF16.")


class Gpu(Strict):
    """One NVIDIA GPU, from torch where torch can use it, completed by NVML."""

    name: str
    uuid: str | None = None
    compute_capability: str | None = Field(default=None, description="Such as '12.1'.")
    sm_count: int | None = Field(default=None, description="Streaming multiprocessors.")
    shared_memory_per_block_optin: int | None = Field(
        default=None, description="Most shared memory a block may ask for, bytes."
    )
    integrated: bool | None = Field(default=None, description="CPU and GPU share one memory pool.")
    memory_total_gib: float | None = Field(
        default=None, description="What CUDA calls its total; the pool, if integrated."
    )
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    throttle_reasons: list[str] = Field(
        default_factory=list, description="NVML's reasons for a lowered clock, idle excepted."
    )
    temperature_c: float | None = None
    power_w: float | None = None
    usable_by_torch: bool | None = Field(default=None, description="torch ran a small computation on it.")

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability as (major, minor)."""
        if not self.compute_capability:
            return None
        major, _, minor = self.compute_capability.partition(".")
        return (int(major), int(minor or 0))


class GpuProcess(Strict):
    """A process that holds a GPU context, as NVML lists it."""

    pid: int
    name: str | None = None
    memory_gib: float | None = Field(
        default=None, description="GPU memory it holds; None where the driver does not say."
    )


class Driver(Strict):
    """The NVIDIA driver as each side of it reports itself, and the hardware it should drive."""

    version: str | None = Field(default=None, description="Of the user-space library (NVML).")
    kernel_module_version: str | None = Field(default=None, description="/proc/driver/nvidia/version.")
    cuda_version: str | None = Field(
        default=None, description="Highest CUDA version the driver serves, such as '13.0'."
    )
    nvml_errors: dict[str, str] = Field(
        default_factory=dict, description="NVML query -> its error: NOT_SUPPORTED is a fact."
    )
    cuda_error: str | None = Field(default=None, description="Why the CUDA driver told no device properties.")
    device_files: list[str] | None = Field(
        default=None, description="/dev/nvidia* that exist; [] when none; None: not read."
    )
    denied_device_files: list[str] = Field(
        default_factory=list, description="Those this user may not open for read and write."
    )
    pci_devices: list[str] | None = Field(
        default=None, description="NVIDIA display controllers on the PCI bus, as addresses."
    )
    pci_driver: str | None = Field(
        default=None, description="Kernel driver bound to the first of them, such as 'nvidia'."
    )
    wsl: bool = Field(default=False, description="The GPU is reached through WSL's /dev/dxg instead of /dev/nvidia*.")


class Memory(Strict):
    """/proc/meminfo and, where there is a GPU, what CUDA says about its own pool."""

    total_gib: float | None = Field(default=None, description="MemTotal.")
    available_gib: float | None = Field(default=None, description="MemAvailable: free plus what can be reclaimed.")
    free_gib: float | None = Field(default=None, description="MemFree: touched by nobody.")
    cached_gib: float | None = Field(default=None, description="Cached: page cache, shared memory included.")
    swap_total_gib: float | None = None
    swap_free_gib: float | None = None
    anonymous_gib: float | None = Field(default=None, description="AnonPages: private memory of all processes.")
    shared_gib: float | None = Field(default=None, description="Shmem: tmpfs such as /dev/shm, and shared mappings.")
    kernel_gib: float | None = Field(
        default=None, description="Slab, stacks, page tables and per-CPU areas of the kernel."
    )
    huge_pages_gib: float | None = Field(default=None, description="Hugetlb: set aside as huge pages.")
    unaccounted_gib: float | None = Field(
        default=None, description="MemTotal less all that the kernel names an owner for: mostly what drivers took."
    )
    cuda_free_gib: float | None = Field(default=None, description="Free memory by cudaMemGetInfo.")
    cuda_total_gib: float | None = Field(default=None, description="Total memory by cudaMemGetInfo.")


class Container(Strict):
    """The container engine that this machine offers."""

    engine: Literal["docker", "podman"] | None = None
    usable: bool | None = Field(default=None, description="It answered a question of this user.")
    error: str | None = None
    runtimes: list[str] = Field(default_factory=list)
    nvidia_runtime: bool | None = Field(
        default=None, description="A way to hand GPUs in is registered: runtime or CDI."
    )
    nvidia_ctk: str | None = Field(default=None, description="Path of nvidia-ctk, the NVIDIA Container Toolkit.")
    images: list[Image] | None = Field(default=None, description="Images on this machine; None: not read.")
    emulates: list[str] | None = Field(
        default=None, description="Architectures that the kernel hands to an emulator; None: not read."
    )
    in_docker_group: bool | None = Field(default=None, description="This user is root or in the group 'docker'.")


class Disk(Strict):
    """The file system under the working folder."""

    path: str | None = None
    free_gib: float | None = None
    total_gib: float | None = None


class Limits(Strict):
    """Resource limits (soft) of this process; -1 is unlimited."""

    memlock_bytes: int | None = None
    stack_bytes: int | None = None
    nofile: int | None = None


class Shm(Strict):
    """/dev/shm, through which DataLoader workers pass tensors."""

    size_gib: float | None = None
    used_gib: float | None = None


class Network(Strict):
    """Reach of the Hugging Face hub."""

    hub_reachable: bool | None = Field(default=None, description="None: not asked.")
    error: str | None = None


class Facts(Strict):
    """Everything that was read of one machine, at one moment."""

    schema_version: int = SCHEMA_VERSION
    origin: str = Field(description="'read on <date>', or 'constructed from published outputs: ...'.")
    arch: str | None = Field(default=None, description="uname -m.")
    os: Os = Field(default_factory=Os)
    cpu: Cpu = Field(default_factory=Cpu)
    gpus: list[Gpu] = Field(default_factory=list)
    gpu_processes: list[GpuProcess] | None = Field(default=None, description="None: not read.")
    driver: Driver = Field(default_factory=Driver)
    cuda: CudaToolkit = Field(default_factory=CudaToolkit)
    memory: Memory = Field(default_factory=Memory)
    torch: Torch = Field(default_factory=Torch)
    triton: Triton = Field(default_factory=Triton)
    bitsandbytes: Bitsandbytes = Field(default_factory=Bitsandbytes)
    packages: dict[str, str] = Field(
        default_factory=dict, description="Installed distributions: normalised name -> version."
    )
    python: Python = Field(default_factory=Python)
    compiler: Compiler = Field(default_factory=Compiler)
    container: Container = Field(default_factory=Container)
    runs_in: RunsIn = Field(default_factory=RunsIn)
    disk: Disk = Field(default_factory=Disk)
    limits: Limits = Field(default_factory=Limits)
    shm: Shm = Field(default_factory=Shm)
    network: Network = Field(default_factory=Network)
    env: dict[str, str] = Field(
        default_factory=dict, description="Variables of a fixed list, none of which holds a secret."
    )
    tried: Tried = Field(default_factory=Tried)
    wheels: Wheels = Field(default_factory=Wheels)
    pins: Pins = Field(default_factory=Pins)
    unsloth: Unsloth = Field(default_factory=Unsloth)
    script: Script = Field(default_factory=Script)
    places: list[Place] | None = Field(default=None, description="Folders that outputs and caches go to.")
    hub_cache: HubCache = Field(default_factory=HubCache)
    llama_cpp: LlamaCpp = Field(default_factory=LlamaCpp)
    ollama: Ollama = Field(default_factory=Ollama)
    history: History = Field(default_factory=History)
    fabric: Fabric = Field(default_factory=Fabric)
    hub_token_present: bool | None = Field(default=None, description="A hub token is set; its value is never read.")
    errors: dict[str, str] = Field(default_factory=dict, description="Probe -> why it read nothing.")

    @property
    def gpu(self) -> Gpu | None:
        """The first GPU, or None."""
        return self.gpus[0] if self.gpus else None

    @property
    def unified(self) -> bool:
        """Whether CPU and GPU are known to share one pool."""
        return self.gpu is not None and self.gpu.integrated is True

    @property
    def is_target(self) -> bool:
        """Whether this is a GB10-class machine, by its properties: aarch64, capability 12.1, one memory pool.

        Names, SM counts and memory sizes vary between its variants (row 35), so they decide nothing.
        """
        return self.arch == "aarch64" and self.unified and self.gpus[0].capability == TARGET_COMPUTE_CAPABILITY

    @property
    def has_nvidia_hardware(self) -> bool:
        """Whether anything at all says that an NVIDIA GPU is in this machine, usable or not."""
        d = self.driver
        return bool(self.gpus or d.device_files or d.pci_devices or d.kernel_module_version or d.wsl)

    def device_sentence(self) -> str:
        """The machine in a few words: 'NVIDIA GB10, 12.1, 48 SMs, 119.7 GiB unified'."""
        gpu = self.gpu
        if gpu is None:
            cores = f"{self.cpu.cores} cores" if self.cpu.cores else "unknown cores"
            total = self.memory.total_gib
            size = f"{total:.1f} GiB" if total is not None else "unknown memory"
            seen = "an NVIDIA GPU that could not be read" if self.has_nvidia_hardware else "no NVIDIA GPU"
            return f"{seen}, {self.arch or 'unknown architecture'}, {cores}, {size}"
        parts = [gpu.name]
        if gpu.compute_capability:
            parts.append(gpu.compute_capability)
        if gpu.sm_count:
            parts.append(f"{gpu.sm_count} SMs")
        total = gpu.memory_total_gib or (self.memory.total_gib if gpu.integrated else None)
        if total is not None:
            parts.append(f"{total:.1f} GiB{' unified' if gpu.integrated else ''}")
        if len(self.gpus) > 1:
            parts.append(f"and {len(self.gpus) - 1} more")
        return ", ".join(parts)
