"""Sparks whose software is broken: what each differs from the healthy one by, and where it was published."""

from __future__ import annotations

from typing import Any

from healthy import (
    ATTENTION,
    HUB,
    IN_NGC_CONTAINER,
    NO_CUDART_12,
    PTXAS,
    ROUND_TRIP,
    SITE,
    STOPPED_TORCH,
    TOOLKIT,
    TRITON_35,
    attention_with,
    ptxas,
)

# name -> (base, where it was published, changes)
SOFTWARE: dict[str, tuple[str, str, dict[str, Any]]] = {
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
    "gb10_compile_differs": (
        "gb10_healthy",
        "triton#10331 (a cache that outlives its toolchain), cutlass PR#3120 (cvt with .e2m1x2 on plain sm_121)",
        {
            "tried.compilation.warm_binary": "0" * 64,
            "tried.compilation.target": "sm_121",
            "tried.compilation.fp4": False,
        },
    ),
    "gb10_wrong_attention": (
        "gb10_healthy",
        "GuigsEvt/dgx_spark_config#5 (fmha_cutlassF_f32 for sm80-sm100), flash-attn#1969",
        {
            "tried.attention": attention_with("efficient", "fp32", {"error": 1.0}),
            "tried.extensions": [{"name": "flash-attn", "version": "2.8.3", "error": f"ImportError: {NO_CUDART_12}"}],
            "packages.flash-attn": "2.8.3",
        },
    ),
    "gb10_flex_too_large": (
        "gb10_healthy",
        "unsloth-zoo PR#1165, pytorch#198224 (flex_attention backward, heads of 256, cold cache)",
        {
            "tried.attention": [
                row
                if (row["backend"], row["direction"]) != ("flex", "backward")
                else {k: v for k, v in row.items() if k != "error"}
                | {
                    "refused": "InductorError: No valid triton configs. OutOfMemoryError: out of resource: "
                    "triton_tem_fused_flex_attention_backward Required: 114688 Hardware limit: 101376"
                }
                for row in ATTENTION
            ]
        },
    ),
    "gb10_shared_memory_accepted": (
        "gb10_healthy",
        "triton#8182 (131072 bytes asked for, 101376 there), with the refusal left out",
        {"tried.shared_memory.over_raised": None},
    ),
    "gb10_cuda12_wheels": (
        "gb10_healthy",
        "natolambert/dgx-spark-setup, flash-attn#2118, mamba#891, dgx-spark-playbooks PR#90 (CUDA 12 and x86 code)",
        {
            "wheels.cuda": [
                {
                    "package": "flash-attn",
                    "file": "flash_attn_2_cuda.so",
                    "needs": ["libcudart.so.12"],
                },
                {"package": "torch", "file": "torch/lib/libtorch_cuda.so", "needs": ["libcudart.so.13"]},
            ],
            "wheels.foreign": [
                {
                    "package": "mamba-ssm",
                    "file": "selective_scan_cuda.so",
                    "machine": "x86_64",
                }
            ],
            "cuda.version": "12.9.86",
            "pins.cuda_headers": {"nvtx3/nvToolsExt.h": False, "cuda_profiler_api.h": False, "cuda_runtime.h": True},
            "pins.cmake": "3.31.6",
            "env": {"MAX_JOBS": "20"},
        },
    ),
    "gb10_ngc_replaced": (
        "gb10_healthy",
        "pytorch#157648, vision#9077, slime NOTES_GB10, wshobson dgx-spark-ops, xr-ai (pip inside NVIDIA's image)",
        IN_NGC_CONTAINER
        | {
            "packages.torchvision": "0.25.0a0",
            "packages.torchao": "0.13.0+git",
            "tried.extensions": [
                {
                    "name": "torchvision",
                    "version": "0.25.0a0",
                    "error": "RuntimeError: operator torchvision::nms does not exist",
                }
            ],
            "pins.constraint_file": "/etc/pip/constraint.txt",
            "pins.replaced": ["torch: 2.14.1+cu130 for 2.10.0a0+b4e4ee81d3.nv25.12"],
            "torch.cudnn": None,
            "torch.cudnn_error": "RuntimeError: cuDNN version incompatibility: PyTorch was compiled against (9, 20, 0) but "
            "found runtime version (9, 13, 1)",
            "env": {"LD_LIBRARY_PATH": "/usr/lib/aarch64-linux-gnu"},
        },
    ),
    "gb10_unsloth_old": (
        "gb10_healthy",
        "unsloth#3825, unsloth#3955, unsloth#5101, unsloth PR#5988, unsloth_zoo (gradient_checkpointing.py), dgx-spark-ops G2",
        {
            "unsloth": {
                "version": "2026.1.4",
                "zoo_version": "2026.1.4",
                "disables_fast_inference": True,
                "knows_unified_memory": False,
                "imported": False,
                "import_error": "PackageNotFoundError: No package metadata was found for vllm",
            },
            "packages.unsloth": "2026.1.4",
            "packages.unsloth-zoo": "2026.1.4",
            "packages.flash-attn": "2.7.4.post1",
            "tried.extensions": [{"name": "flash-attn", "version": "2.7.4.post1"}],
            "pins.missing": ["unsloth-zoo needs torchcodec==0.10.0"],
            "env": {"UNSLOTH_DISABLE_UMA_CLONE_LOAD": "1"},
        },
    ),
    "gb10_playbook_as_found": (
        "gb10_healthy",
        "dgx-spark-playbooks#15 and PR#14 (/blob/ page, --rm without a mount)",
        IN_NGC_CONTAINER
        | {
            "script": {"path": "/workspace/test_unsloth.py", "is_web_page": True},
            "places": [
                {"name": "working folder", "path": "/workspace", "in_image": True},
                {"name": "models", "path": "/root/.cache/huggingface/hub", "in_image": False},
                {"name": "compiled kernels", "path": "/root/.triton/cache", "in_image": True},
            ],
        },
    ),
    "gb10_old_script": (
        "gb10_healthy",
        "unsloth PR#10740, unsloth PR#7376, unslothai/notebooks Dockerfile_DGX_Spark (max_seq_length; pins that move)",
        {
            "script": {
                "path": "/home/user/spark/test_unsloth.py",
                "is_web_page": False,
                "sft_arguments": ["max_seq_length", "output_dir"],
                "unknown_arguments": ["max_seq_length"],
            },
            "packages.trl": "0.26.1",
            "pins.drifted": ["transformers: 5.17.0 for 4.56.2"],
            "pins.locked": 31,
            "python.executable": "/usr/bin/python3",
            "python.virtual_environment": False,
            "python.ensurepip": False,
        },
    ),
    "gb10_models": (
        "gb10_healthy",
        "dgx-spark-playbooks#85, recipe-registry#17, unsloth#4867, mamba#1019, sovgrid blog (models that do not fit)",
        {
            "hub_cache": {
                "path": HUB,
                "models": [
                    {
                        "repository": "unsloth/Phi-3.5-mini-instruct",
                        "model_type": "phi3",
                        "known": True,
                        "attention_factor": 32.0,
                    },
                    {"repository": "Qwen/Qwen3.5-35B-A3B", "model_type": "qwen3_5_moe", "known": False},
                    {
                        "repository": "meta-llama/Llama-3.1-8B-Instruct",
                        "model_type": "llama",
                        "known": True,
                        "truncated": ["model-00002-of-00004.safetensors"],
                    },
                ],
                "incomplete": ["openai/gpt-oss-20b"],
                "kernels": {"kernels-community/vllm-flash-attn3": ["torch210-cxx11-cu130-x86_64-linux"]},
                "token_accepted": False,
            },
            "packages.kernels": "0.11.4",
            "hub_token_present": True,
        },
    ),
    "gb10_four_bit_skew": (
        "gb10_healthy",
        "dgx-spark-playbooks#57, bitsandbytes#1542 ('Parameter' object has no attribute 'compress_statistics')",
        {"tried.four_bit": [ROUND_TRIP | {"parameter": "Parameter", "has_statistics": False}]},
    ),
    "gb10_images": (
        "gb10_healthy",
        "unsloth#3429, NemoClaw PR#304, dgx-spark-playbooks PR#23, unsloth PR#10491, spark-vllm-docker#21 (what serves)",
        {
            "container.images": [
                {"tags": ["unsloth/unsloth:dgxspark-latest"], "architecture": "arm64", "created": "2026-01-19"},
                {"tags": ["workbench-llama2:latest"], "architecture": "amd64", "created": "2025-11-02"},
            ],
            "ollama": {"path": "/usr/local/bin/ollama", "library": "cuda"},
            "llama_cpp": {"path": "/home/user/.unsloth/llama.cpp/llama-quantize", "cuda": False},
            "packages.vllm": "0.23.0",
        },
    ),
}
