"""The healthy machines that the recorded facts are made from, and the parts that broken ones share with them.

The GB10 was not read on a GB10: its values are those of the outputs that its origin names.
"""

from __future__ import annotations

from typing import Any

SITE = "/home/user/sparkproof/.venv/lib/python3.12/site-packages"
BUNDLED = f"{SITE}/triton/backends/nvidia/bin"
TOOLKIT = "/usr/local/cuda/bin/ptxas"
NO_CUDART_12 = "libcudart.so.12: cannot open shared object file: No such file or directory"
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
BINARY = "51bd1e1fd33a3d1b05615d10a5b08f7814427dac9e5f8dd0714ccb9a28c19466"
COMPILED = {
    "target": "sm_121a",
    "cold_s": 1.1,
    "warm_s": 0.4,
    "cold_binary": BINARY,
    "warm_binary": BINARY,
    "again_binary": BINARY,
    "live_variables": ["TRITON_PTXAS_BLACKWELL_PATH"],
    "fp4": True,
}
SHARED = {
    "limit": 101376,
    "fits_bytes": 98304,
    "fits_ran": True,
    "over_bytes": 131072,
    "over_raised": "OutOfResources: out of resource: shared memory, Required: 131072, Hardware limit: 101376.",
    "alive_after": True,
}
NO_KERNEL = "RuntimeError: No available kernel. Aborting execution."
ERRORS = {"bf16": 0.0031, "fp16": 0.0004, "fp32": 0.0002}


def attention() -> list[dict[str, Any]]:
    """The matrix that torch's own conditions give: flash and cuDNN take 16 bits alone, and flash's backward pass stops
    at heads of 192 on compute capability 8.6, 8.9 and 12.x."""
    rows = []
    for size in (64, 128, 256):
        for dtype, error in ERRORS.items():
            for backend in ("flash", "efficient", "cudnn", "math"):
                for direction in ("forward", "backward"):
                    no = dtype == "fp32" and backend in ("flash", "cudnn")
                    no |= size == 256 and (backend, direction) in (("flash", "backward"), ("cudnn", "backward"))
                    row = {"backend": backend, "dtype": dtype, "head_size": size, "direction": direction}
                    rows.append(row | ({"refused": NO_KERNEL} if no else {"error": error}))
    for direction in ("forward", "backward"):
        rows.append({"backend": "flex", "dtype": "bf16", "head_size": 256, "direction": direction, "error": 0.0032})
    return rows


ATTENTION = attention()


def attention_with(backend: str, dtype: str | None, change: dict[str, Any], size: int | None = None) -> Any:
    """The healthy matrix with some of its rows changed."""
    return [
        {k: v for k, v in row.items() if k not in ("error", "refused")} | change
        if row["backend"] == backend and dtype in (None, row["dtype"]) and size in (None, row["head_size"])
        else row
        for row in ATTENTION
    ]


ROUND_TRIP = {
    "device": "cuda",
    "parameter": "Params4bit",
    "has_statistics": True,
    "relative_error": 0.09203,
    "product_error": 0.0017,
}
TRIED = {
    "compilation": COMPILED,
    "four_bit": [ROUND_TRIP],
    "attention": ATTENTION,
    "shared_memory": SHARED,
    "canaries": {
        "copy_gb_s": 187.0,
        "gemv_gb_s": 226.0,
        "gemm_tflops": 60.0,
        "load_s": 4.1,
        "load_clock_mhz": 2405,
        "load_power_w": 96.0,
        "load_temperature_c": 62.0,
    },
    "convolution": True,
}
# As eugr/spark-vllm-docker's NETWORKING.md shows it: two twins a port, one cable or none.
TWINS = {
    "rocep1s0f0": "enp1s0f0np0",
    "rocep1s0f1": "enp1s0f1np1",
    "roceP2p1s0f0": "enP2p1s0f0np0",
    "roceP2p1s0f1": "enP2p1s0f1np1",
}


def fabric(cable: bool, **changes: Any) -> dict[str, Any]:
    """A Spark's four interfaces, with a cable in the second port or without."""
    up = [link for device, link in TWINS.items() if cable and device.endswith("f1")]
    links = [{"name": "enP7s7", "up": True, "mtu": 1500, "addresses": ["192.0.2.17"]}]
    for link in TWINS.values():
        here = ["192.168.177.11"] if link in up[:1] else []
        links.append({"name": link, "up": link in up, "mtu": 9000 if link in up else 1500, "addresses": here})
    gid = {"device": "rocep1s0f1", "port": 1, "address": "192.168.177.11", "link": "enp1s0f1np1"}
    return {
        "links": links,
        "ports": [{"device": d, "port": 1, "link": link, "up": link in up} for d, link in TWINS.items()],
        "gids": [gid | {"index": 2, "version": "v1"}, gid | {"index": 3, "version": "v2"}] if cable else [],
        "env": {},
    } | changes


TWO_SPARKS = fabric(True, env={"NCCL_SOCKET_IFNAME": "enp1s0f1np1", "NCCL_IB_HCA": "rocep1s0f1,roceP2p1s0f1"})
HUB = "/home/user/.cache/huggingface/hub"
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
        "ensurepip": True,
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
        "images": [
            {
                "tags": ["nvcr.io/nvidia/pytorch:26.08-py3"],
                "digest": "sha256:0f",
                "architecture": "arm64",
                "created": "2026-08-21",
            }
        ],
        "emulates": [],
    },
    "disk": {"path": "/home/user/sparkproof", "free_gib": 3105.0, "total_gib": 3667.0},
    "limits": {"memlock_bytes": 16065425408, "stack_bytes": 8388608, "nofile": 1024},
    "shm": {"size_gib": 59.85, "used_gib": 0.01},
    "network": {"hub_reachable": True},
    "env": {"CUDA_HOME": "/usr/local/cuda"},
    "hub_token_present": False,
    "tried": TRIED,
    "wheels": {
        "scanned": 611,
        "cuda": [{"package": "torch", "file": "torch/lib/libtorch_cuda.so", "needs": ["libcudart.so.13"]}],
        "cuda_majors_present": [13],
        "loaded": [f"{SITE}/nvidia/cu13/lib/libcudart.so.13", f"{SITE}/nvidia/cudnn/lib/libcudnn.so.9"],
    },
    "pins": {
        "lock_file": "/home/user/sparkproof/requirements/lock.txt",
        "locked": 6,
        "torchao_minimum": "0.16.0",
        "cuda_headers": {"nvtx3/nvToolsExt.h": True, "cuda_profiler_api.h": True, "cuda_runtime.h": True},
    },
    "script": {"path": "/home/user/sparkproof/test_unsloth.py", "is_web_page": False},
    "places": [{"name": "working folder", "path": "/home/user/sparkproof"}],
    "hub_cache": {
        "path": HUB,
        "models": [{"repository": "meta-llama/Llama-3.2-1B-Instruct", "model_type": "llama", "known": True}],
    },
    "history": {"memory_errors": 0, "crashes": 0},
    "fabric": fabric(False),
}
IN_NGC_CONTAINER = {
    "os.in_container": True,
    "os.product": None,
    "os.dgx_release": None,
    "container": {"nvidia_ctk": None, "in_docker_group": True},
    "limits.memlock_bytes": -1,
    "limits.stack_bytes": 67108864,
    "places": [
        {"name": "working folder", "path": "/workspace", "in_image": False},
        {"name": "models", "path": "/root/.cache/huggingface/hub", "in_image": False},
        {"name": "compiled kernels", "path": "/root/.triton/cache", "in_image": False},
    ],
    "history": {},
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
    "container.images.0.architecture": "amd64",
    "tried.canaries": {
        "copy_gb_s": 905.0,
        "gemv_gb_s": 938.0,
        "gemm_tflops": 152.0,
        "load_s": 4.0,
        "load_clock_mhz": 2520,
        "load_power_w": 431.0,
        "load_temperature_c": 66.0,
    },
    "fabric": {
        "links": [{"name": "enp6s0", "up": True, "mtu": 1500, "addresses": ["192.0.2.33"]}],
        "ports": [],
        "gids": [],
    },
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
    "tried": {"compilation": COMPILED, "four_bit": [ROUND_TRIP | {"device": "cpu"}]},
    "wheels": {"scanned": 402},
    "pins.cuda_headers": {},
    "fabric": {
        "links": [{"name": "wlp0s20f3", "up": True, "mtu": 1500, "addresses": ["192.0.2.81"]}],
        "ports": [],
        "gids": [],
    },
}
NOT_TRIED: dict[str, Any] = {
    "tried.attention": None,
    "tried.shared_memory": None,
    "tried.canaries": None,
    "tried.convolution": None,
}
STOPPED_TORCH = NOT_TRIED | {
    "gpus.0.usable_by_torch": False,
    "memory.cuda_free_gib": None,
    "memory.cuda_total_gib": None,
}
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
    "tried.compilation": {
        "live_variables": ["TRITON_PTXAS_PATH"],
        "error": "the cold compilation: triton.runtime.errors.PTXASError: PTXAS error: Internal Triton PTX codegen error: "
        + NO_SM_121A,
    },
}
NO_LIBCUDA = "libcuda.so.1: cannot open shared object file: No such file or directory"
NO_GPU_SEEN: dict[str, Any] = NOT_TRIED | {
    "gpus": [],
    "gpu_processes": None,
    "memory.cuda_free_gib": None,
    "memory.cuda_total_gib": None,
    "torch.cuda_available": False,
}
