"""Sparks whose machine is broken: driver, memory, power, containers, the link to another one."""

from __future__ import annotations

from typing import Any

from healthy import (
    IN_NGC_CONTAINER,
    NO_GPU_SEEN,
    NO_LIBCUDA,
    STOPPED_CUDA,
    STOPPED_TORCH,
    TWO_SPARKS,
    fabric,
)

# name -> (base, where it was published, changes)
MACHINE: dict[str, tuple[str, str, dict[str, Any]]] = {
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
        | {"torch.cuda_available": None, "torch.error": "torch stopped while it started CUDA: no answer within 40 s"},
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
    "gb10_hot": (
        "gb10_healthy",
        "open-gpu-kernel-modules#1358, NVIDIA developer forum 368536 (91 C before a power-off)",
        {
            "gpus.0.throttle_reasons": ["hardware thermal slowdown"],
            "gpus.0.temperature_c": 92.0,
            "gpus.0.sm_clock_mhz": 1500,
        },
    ),
    "gb10_low_power": (
        "gb10_healthy",
        "spark-gpu-throttle-check, sparkview, model-serving-minefield PR#55 (USB-PD fell to its low-power state)",
        {
            "tried.canaries.load_clock_mhz": 611,
            "tried.canaries.load_power_w": 22.0,
            "tried.canaries.gemm_tflops": 15.0,
        },
    ),
    "gb10_slow_gemv": (
        "gb10_healthy",
        "tonyd2wild DeepSeek-V4.1#1 (GEMV 3.3 times slower, the copy unchanged)",
        {"tried.canaries.gemv_gb_s": 68.5},
    ),
    "gb10_crashed": (
        "gb10_healthy",
        "open-gpu-kernel-modules#1358, dgx-spark-playbooks#97, MiaAI-Lab#146, MiaAI-Lab#47 (freezes, NV_ERR_NO_MEMORY, 102 GiB)",
        {
            "os.kernel": "6.17.0-1031-nvidia",
            "driver.version": "580.173.02",
            "driver.kernel_module_version": "580.173.02",
            "memory.total_gib": 102.3,
            "memory.swap_free_gib": 3.1,
            "history": {"memory_errors": 37, "crashes": 2, "crash_dates": ["2026-08-30", "2026-08-28"]},
        },
    ),
    "gb10_bad_kernel": (
        "gb10_healthy",
        "NVIDIA developer forum 366026 (DGX OS 7.4.0), conselara blog (driver 590)",
        {
            "os.kernel": "6.17.0-1008-nvidia",
            "os.dgx_release": "7.4.0",
            "driver.version": "590.44.01",
            "driver.kernel_module_version": "590.44.01",
        },
    ),
    "gb10_two_sparks": (
        "gb10_healthy",
        "eugr/spark-vllm-docker docs/NETWORKING.md (ibdev2netdev with one cable), dgx-spark-playbooks nccl",
        {"fabric": TWO_SPARKS},
    ),
    "gb10_two_sparks_down": (
        "gb10_healthy",
        "tonyd2wild PR#40, MiaAI-Lab PR#10 (variables for a link that is down, under another name)",
        {"fabric": fabric(False, env={"NCCL_SOCKET_IFNAME": "enp1s0f2np2", "NCCL_IB_HCA": "mlx5_0"})},
    ),
    "gb10_two_sparks_drift": (
        "gb10_healthy",
        "tonyd2wild PR#40, MiaAI-Lab PR#10 (GID index 3 became 4; MTU 1500)",
        {
            "fabric": TWO_SPARKS
            | {
                "env": {"NCCL_IB_GID_INDEX": "3", "NCCL_SOCKET_IFNAME": "enp1s0f1np1"},
                "gids": [
                    {
                        "device": "rocep1s0f1",
                        "port": 1,
                        "index": 4,
                        "address": "192.168.177.11",
                        "version": "v2",
                        "link": "enp1s0f1np1",
                    }
                ],
                "links": [
                    link | ({"mtu": 1500} if link["name"] == "enp1s0f1np1" else {}) for link in TWO_SPARKS["links"]
                ],
            }
        },
    ),
}
