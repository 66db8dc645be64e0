"""Makes the recorded facts in this folder: `python tests/facts/make.py`.

None of the GB10 files was read on a GB10: each is constructed from outputs that were published in the threads it
names, on top of one healthy machine. Every broken file differs from a healthy one by what is written here, and by
nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparkproof.facts.model import Facts

HERE = Path(__file__).parent
SITE = "/home/user/sparkproof/.venv/lib/python3.12/site-packages"
BUNDLED = f"{SITE}/triton/backends/nvidia/bin"
TOOLKIT = "/usr/local/cuda/bin/ptxas"
NO_SM_121A = "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"
CUDA_LIBRARIES = ["cpu", "cuda118", "cuda121", "cuda124", "cuda126", "cuda128", "cuda130"]
PACKAGES = {
    "bitsandbytes": "0.50.2",
    "huggingface-hub": "1.33.0",
    "peft": "0.21.2",
    "torch": "2.14.1+cu130",
    "transformers": "5.17.0",
    "triton": "3.8.0",
}


def ptxas(name: str, version: str, knows: bool, source: str = "bundled") -> dict[str, Any]:
    path = name if name.startswith("/") else f"{BUNDLED}/{name}"
    error = None if knows else NO_SM_121A
    return {"path": path, "source": source, "version": version, "knows_sm_121a": knows, "error": error}


PTXAS = [
    ptxas("ptxas", "12.9.86", True),
    ptxas("ptxas-blackwell", "13.3.33", True),
    ptxas(TOOLKIT, "13.0.88", True, "toolkit"),
]
GB10 = {
    "origin": "constructed from published outputs: NVIDIA DGX Spark user guide and known issues, NVIDIA developer "
    "forum 358869, triton#8182, unsloth_zoo PR#1165; not read on a GB10",
    "arch": "aarch64",
    "os": {
        "name": "ubuntu",
        "version": "Ubuntu 24.04.3 LTS",
        "kernel": "6.11.0-1016-nvidia",
        "in_container": False,
        "product": "NVIDIA_DGX_Spark",
        "dgx_release": "7.2.3",
    },
    "cpu": {"model": None, "cores": 20, "avx512_bf16": False},
    "gpus": [
        {
            "name": "NVIDIA GB10",
            "uuid": "GPU-00000000-0000-0000-0000-000000000001",
            "compute_capability": "12.1",
            "sm_count": 48,
            "shared_memory_per_block_optin": 101376,
            "integrated": True,
            "memory_total_gib": 119.7,
            "sm_clock_mhz": 208,
            "max_sm_clock_mhz": 3003,
            "temperature_c": 38.0,
            "power_w": 11.0,
            "usable_by_torch": True,
        }
    ],
    "gpu_processes": [
        {"pid": 2871, "name": "Xorg", "memory_gib": 0.109},
        {"pid": 3020, "name": "gnome-shell", "memory_gib": 0.044},
    ],
    "driver": {
        "version": "580.95.05",
        "kernel_module_version": "580.95.05",
        "cuda_version": "13.0",
        "nvml_errors": {"memory": "Not Supported"},
        "device_files": [
            "/dev/nvidia-modeset",
            "/dev/nvidia-uvm",
            "/dev/nvidia-uvm-tools",
            "/dev/nvidia0",
            "/dev/nvidiactl",
        ],
        "pci_devices": ["000f:01:00.0"],
        "pci_driver": "nvidia",
    },
    "cuda": {"nvcc": "/usr/local/cuda/bin/nvcc", "version": "13.0.88"},
    "memory": {
        "total_gib": 119.7,
        "available_gib": 112.4,
        "free_gib": 106.9,
        "cached_gib": 7.1,
        "swap_total_gib": 16.0,
        "swap_free_gib": 16.0,
        "anonymous_gib": 2.6,
        "shared_gib": 0.2,
        "kernel_gib": 0.9,
        "huge_pages_gib": 0.0,
        "unaccounted_gib": 2.1,
        "cuda_free_gib": 106.5,
        "cuda_total_gib": 119.7,
    },
    "torch": {
        "version": "2.14.1+cu130",
        "cuda": "13.0",
        "arch_list": ["sm_80", "sm_90", "sm_100", "sm_110", "sm_120"],
        "file": f"{SITE}/torch/__init__.py",
        "cudnn": "91300",
        "cuda_available": True,
    },
    "triton": {
        "version": "3.8.0",
        "ptxas": PTXAS,
        "live_ptxas": f"{BUNDLED}/ptxas-blackwell",
        "live_variable": "TRITON_PTXAS_BLACKWELL_PATH",
    },
    "bitsandbytes": {"version": "0.50.2", "libraries": CUDA_LIBRARIES, "repacks_on_avx512_bf16": True},
    "packages": PACKAGES,
    "python": {
        "version": "3.12.3",
        "executable": "/home/user/sparkproof/.venv/bin/python",
        "headers": "/usr/include/python3.12",
        "headers_expected": "/usr/include/python3.12",
        "externally_managed": False,
        "virtual_environment": True,
        "requirement_conflicts": [],
    },
    "compiler": {
        "path": "/usr/bin/cc",
        "version": "cc (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0",
        "searched": True,
    },
    "container": {
        "engine": "docker",
        "usable": True,
        "runtimes": ["io.containerd.runc.v2", "nvidia", "runc"],
        "nvidia_runtime": True,
        "nvidia_ctk": "/usr/bin/nvidia-ctk",
        "in_docker_group": True,
    },
    "disk": {"path": "/home/user/sparkproof", "free_gib": 3105.0, "total_gib": 3667.0},
    "limits": {"memlock_bytes": 16065425408, "stack_bytes": 8388608, "nofile": 1024},
    "shm": {"size_gib": 59.85, "used_gib": 0.01},
    "network": {"hub_reachable": True},
    "env": {"CUDA_HOME": "/usr/local/cuda"},
    "hub_token_present": False,
}
IN_NGC_CONTAINER = {
    "os.in_container": True,
    "os.product": None,
    "os.dgx_release": None,
    "container": {"nvidia_ctk": None, "in_docker_group": True},
    "limits.memlock_bytes": -1,
    "limits.stack_bytes": 67108864,
}
RTX4090 = {
    "origin": "constructed: a desktop PC with the properties that NVIDIA publishes for a GeForce RTX 4090",
    "arch": "x86_64",
    "os.kernel": "6.8.0-85-generic",
    "os.product": None,
    "os.dgx_release": None,
    "cpu": {"model": "AMD Ryzen 9 5950X 16-Core Processor", "cores": 32, "avx512_bf16": False},
    "gpus.0.name": "NVIDIA GeForce RTX 4090",
    "gpus.0.compute_capability": "8.9",
    "gpus.0.sm_count": 128,
    "gpus.0.integrated": False,
    "gpus.0.memory_total_gib": 23.52,
    "gpus.0.sm_clock_mhz": 210,
    "gpus.0.max_sm_clock_mhz": 3105,
    "gpus.0.power_w": 18.0,
    "driver.nvml_errors": {},
    "driver.pci_devices": ["0000:01:00.0"],
    "memory.total_gib": 62.7,
    "memory.available_gib": 55.1,
    "memory.free_gib": 21.3,
    "memory.cached_gib": 33.0,
    "memory.unaccounted_gib": 0.6,
    "memory.cuda_free_gib": 22.6,
    "memory.cuda_total_gib": 23.52,
    "torch.arch_list": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}
LAPTOP = {
    "origin": "constructed: a laptop with integrated graphics of another maker",
    "arch": "x86_64",
    "os.kernel": "6.8.0-85-generic",
    "os.product": "21CB0085GE",
    "os.dgx_release": None,
    "cpu": {"model": "12th Gen Intel(R) Core(TM) i7-1260P", "cores": 16, "avx512_bf16": False},
    "gpus": [],
    "gpu_processes": None,
    "driver": {
        "nvml_errors": {"init": "NVML Shared Library Not Found"},
        "cuda_error": "libcuda.so.1: cannot open shared object file: No such file or directory",
        "device_files": [],
        "pci_devices": [],
    },
    "cuda": {},
    "memory": {
        "total_gib": 31.1,
        "available_gib": 22.4,
        "free_gib": 9.8,
        "cached_gib": 12.9,
        "anonymous_gib": 6.1,
        "shared_gib": 0.9,
        "kernel_gib": 1.0,
        "unaccounted_gib": 0.7,
    },
    "torch": {"version": "2.13.0+cpu", "file": f"{SITE}/torch/__init__.py", "cuda_available": False},
    "packages.torch": "2.13.0+cpu",
    "triton.ptxas": PTXAS[:2],
    "container": {},
    "env": {},
}
STOPPED_TORCH = {"gpus.0.usable_by_torch": False, "memory.cuda_free_gib": None, "memory.cuda_total_gib": None}
# What only the CUDA driver tells is not to be had where it hangs.
STOPPED_CUDA = {
    "gpus.0.sm_count": None,
    "gpus.0.shared_memory_per_block_optin": None,
    "gpus.0.integrated": None,
    "gpus.0.memory_total_gib": None,
}
TRITON_35 = {
    "triton.version": "3.5.0",
    "triton.ptxas": [ptxas("ptxas", "12.8.93", False), ptxas(TOOLKIT, "13.0.88", True, "toolkit")],
    "triton.live_ptxas": f"{BUNDLED}/ptxas",
    "triton.live_variable": "TRITON_PTXAS_PATH",
    "packages.triton": "3.5.0",
}
NO_LIBCUDA = "libcuda.so.1: cannot open shared object file: No such file or directory"
NO_GPU_SEEN: dict[str, Any] = {
    "gpus": [],
    "gpu_processes": None,
    "memory.cuda_free_gib": None,
    "memory.cuda_total_gib": None,
    "torch.cuda_available": False,
}
# name -> (base, where it was published, changes)
FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gb10_no_gpus_flag": (
        "gb10_healthy",
        "unsloth#3553, unsloth PR#4780 (container started without --gpus)",
        IN_NGC_CONTAINER
        | NO_GPU_SEEN
        | {
            "driver.version": None,
            "driver.cuda_version": None,
            "driver.device_files": [],
            "driver.cuda_error": NO_LIBCUDA,
        }
        | {"driver.nvml_errors": {"init": "NVML Shared Library Not Found"}},
    ),
    "gb10_wedged": (
        "gb10_healthy",
        "unsloth#3553 (CUDA context wedged until a reboot)",
        STOPPED_TORCH
        | STOPPED_CUDA
        | {"torch.cuda_available": None, "torch.error": "torch stopped while it started CUDA: no answer within 60 s"},
    ),
    "gb10_triton35": ("gb10_healthy", "triton#8539, triton#9181 (ptxas 12.8.93 of triton 3.5.0)", TRITON_35),
    "gb10_stale_variable": (
        "gb10_healthy",
        "triton#10331 (TRITON_PTXAS_PATH has no effect from 3.6 on)",
        {
            "triton.variables": {"TRITON_PTXAS_PATH": TOOLKIT},
            "triton.ptxas": [*PTXAS, ptxas(TOOLKIT, "13.0.88", True, "TRITON_PTXAS_PATH")],
        },
    ),
    "gb10_capability_warning": (
        "gb10_healthy",
        "pytorch#164596, pytorch#172629, unsloth#3898 (the warning's text)",
        {
            "torch.version": "2.9.1+cu130",
            "packages.torch": "2.9.1+cu130",
            "torch.warnings": [
                "Found GPU0 NVIDIA GB10 which is of cuda capability 12.1. Minimum and Maximum cuda capability "
                "supported by this version of PyTorch is (8.0) - (12.0)"
            ],
        },
    ),
    "gb10_cpu_torch": (
        "gb10_healthy",
        "pytorch#168065, transformerlab#1330 (PyPI's aarch64 torch was CPU-only)",
        STOPPED_TORCH
        | {"torch": {"version": "2.9.1+cpu", "file": f"{SITE}/torch/__init__.py", "cuda_available": False}}
        | {"packages.torch": "2.9.1+cpu"},
    ),
    "gb10_no_headers": (
        "gb10_healthy",
        "NVIDIA xr-ai troubleshooting, dgx-spark-playbooks PR#90 (no python3-dev, no compiler)",
        {"python.headers": None, "compiler": {"searched": True}},
    ),
    "gb10_page_cache": (
        "gb10_healthy",
        "llamastash#80 (2.77 GiB free by CUDA beside 52 GiB of MemAvailable), vllm#35313",
        {
            "memory.available_gib": 52.0,
            "memory.free_gib": 2.9,
            "memory.cached_gib": 50.4,
            "memory.anonymous_gib": 62.0,
            "memory.cuda_free_gib": 2.77,
        },
    ),
    "gb10_memory_held": (
        "gb10_healthy",
        "LocalAI#10722, vllm#45179 (pinned memory held after the process was killed)",
        {
            "memory.available_gib": 41.2,
            "memory.free_gib": 38.0,
            "memory.cached_gib": 5.0,
            "memory.unaccounted_gib": 73.1,
            "memory.cuda_free_gib": 38.0,
        },
    ),
    "gb10_neighbours": (
        "gb10_healthy",
        "dgx-spark-playbooks#97 and #116 (pool exhausted beside a model server), sparkrun#261",
        {
            "gpu_processes": [{"pid": 4411, "name": "VLLM::EngineCore", "memory_gib": 101.5}],
            "memory.available_gib": 9.1,
            "memory.free_gib": 6.0,
            "memory.cached_gib": 4.0,
            "memory.unaccounted_gib": 103.4,
            "memory.cuda_free_gib": 5.9,
            "env": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        },
    ),
    "gb10_small_shm": (
        "gb10_healthy",
        "pytorch#5040, dgx-spark-playbooks unsloth README (Docker's defaults)",
        IN_NGC_CONTAINER
        | {"shm.size_gib": 0.062, "shm.used_gib": 0.0, "limits.memlock_bytes": 8388608, "limits.stack_bytes": 8388608},
    ),
    "gb10_docker_denied": (
        "gb10_healthy",
        "dgx-spark-playbooks READMEs (user not in the group 'docker')",
        {
            "container.usable": False,
            "container.error": "permission denied while trying to connect to the Docker daemon socket at "
            "unix:///var/run/docker.sock",
            "container.runtimes": [],
            "container.nvidia_runtime": None,
            "container.in_docker_group": False,
        },
    ),
    "gb10_no_nvidia_runtime": (
        "gb10_healthy",
        "xr-ai PR#525 (NVIDIA runtime not registered with Docker)",
        {"container.runtimes": ["io.containerd.runc.v2", "runc"], "container.nvidia_runtime": False},
    ),
    "gb10_driver_mismatch": (
        "gb10_healthy",
        "NVIDIA developer forum 366026 (panics and mismatch after an update)",
        STOPPED_TORCH
        | NO_GPU_SEEN
        | {
            "driver.version": None,
            "driver.cuda_version": None,
            "driver.nvml_errors": {"init": "Driver/library version mismatch"},
            "torch.error": "RuntimeError: No CUDA GPUs are available",
        },
    ),
    "gb10_mixed_packages": (
        "gb10_healthy",
        "dgx-spark-playbooks PR#19, unsloth PR#10740, bitsandbytes releases (pins chosen one by one)",
        {
            "packages.huggingface-hub": "0.36.0",
            "env": {"HF_HUB_ENABLE_HF_TRANSFER": "1"},
            "python.externally_managed": True,
            "python.virtual_environment": False,
            "python.executable": "/usr/bin/python3",
            "python.requirement_conflicts": ["unsloth 2026.7.3 needs trl<=0.24.0, but 0.26.1 is installed"],
            "bitsandbytes.version": "0.47.0",
            "bitsandbytes.libraries": ["cpu", "cuda118", "cuda128", "cuda129"],
            "packages.bitsandbytes": "0.47.0",
        },
    ),
    "gb10_hot": (
        "gb10_healthy",
        "open-gpu-kernel-modules#1358, NVIDIA developer forum 368536 (91 C before a power-off)",
        {
            "gpus.0.throttle_reasons": ["hardware thermal slowdown"],
            "gpus.0.temperature_c": 92.0,
            "gpus.0.sm_clock_mhz": 1500,
        },
    ),
    "n1x_healthy": (
        "gb10_healthy",
        "unsloth PR#11208 (RTX Spark N1X is compute capability 12.1 too, 45.4 GiB pool)",
        {
            "os.product": None,
            "os.dgx_release": None,
            "gpus.0.name": "NVIDIA RTX Spark N1X",
            "gpus.0.sm_count": 40,
            "gpus.0.memory_total_gib": 45.4,
            "memory.total_gib": 45.4,
            "memory.available_gib": 39.8,
            "memory.free_gib": 34.0,
            "memory.cuda_free_gib": 33.6,
            "memory.cuda_total_gib": 45.4,
        },
    ),
    "x86_rtx4090": ("gb10_healthy", "", RTX4090),
    "x86_laptop": ("gb10_healthy", "", LAPTOP),
    "x86_t4": (
        "x86_rtx4090",
        "CUDA programming guide, table of technical specifications (compute capability 7.5: 64 KiB a block)",
        {
            "gpus.0.name": "Tesla T4",
            "gpus.0.compute_capability": "7.5",
            "gpus.0.sm_count": 40,
            "gpus.0.shared_memory_per_block_optin": 65536,
            "gpus.0.memory_total_gib": 14.57,
            "memory.cuda_total_gib": 14.57,
            "memory.cuda_free_gib": 14.0,
        },
    ),
    "x86_avx512_bf16": (
        "x86_laptop",
        "a server CPU with AVX512-BF16, without a GPU",
        {"cpu": {"model": "Intel(R) Xeon(R) Platinum 8481C", "cores": 8, "avx512_bf16": True}},
    ),
}


def document(name: str) -> dict[str, Any]:
    """The facts of one file, as data."""
    if name == "gb10_healthy":
        return Facts.model_validate(GB10).model_dump(mode="json")
    base, published, changes = FILES[name]
    data = document(base)
    for key, value in changes.items():
        place, *rest = key.split(".")
        target: Any = data
        for part in rest:
            target, place = target[int(place) if isinstance(target, list) else place], part
        target[int(place) if isinstance(target, list) else place] = value
    if published:
        data["origin"] = f"constructed from published outputs: {published}; on the base of {base}"
    return Facts.model_validate(data).model_dump(mode="json")


def text(name: str) -> str:
    """What the file must hold."""
    return Facts.model_validate(document(name)).model_dump_json(indent=2, exclude_defaults=False) + "\n"


NAMES = ["gb10_healthy", *FILES]

if __name__ == "__main__":
    for file_name in NAMES:
        (HERE / f"{file_name}.json").write_text(text(file_name), encoding="utf-8")
