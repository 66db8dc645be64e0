"""What a training process says about itself: digests, LoRA's state, memory, versions, conditions."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparkproof.engines.base import LoadSpec, inference, lora_parameters

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "safetensors",
    "unsloth",
)
GIB = 2.0**30


def _sha(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return hashlib.sha256(
        f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """sha256 of each LoRA tensor: dtype, shape and bits."""
    return {name: _sha(parameter)[:16] for name, parameter in lora_parameters(model).items()}


def base_digest(model: nn.Module) -> str:
    """One sha256 over every frozen parameter as it is stored: training and generating must not change the base."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name:
            digest.update(f"{name.rsplit('.base_layer', 1)[0]}{_sha(parameter)}".encode())
    return digest.hexdigest()


def lora_account(model: nn.Module, target_modules: Sequence[str]) -> dict[str, Any]:
    """Which targeted modules have LoRA, what of it is frozen, which B are still zero, and what else is trainable."""
    lora = lora_parameters(model)
    # A wrapped module keeps its name and gets children (base_layer, lora_A ...); a bare one is a leaf with a weight.
    targeted = sorted({n.split(".base_layer")[0] for n, m in model.named_modules() if _is_target(n, m, target_modules)})
    owners = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_B." in n}
    return {
        "targeted": len(targeted),
        "without_lora": [n for n in targeted if n not in owners],
        "tensors": len(lora),
        "frozen": [n for n, p in lora.items() if not p.requires_grad],
        "b_zero": [n for n, p in lora.items() if n.endswith("lora_B") and not bool(p.detach().any())],
        "b_max": max((float(p.detach().abs().max()) for n, p in lora.items() if n.endswith("lora_B")), default=0.0),
        "parameters": sum(p.numel() for p in lora.values()),
        "other_trainable": [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n],
    }


def _is_target(name: str, module: nn.Module, target_modules: Sequence[str]) -> bool:
    bare = name.removesuffix(".base_layer")
    return isinstance(module, nn.Linear) and bare.rsplit(".", 1)[-1] in target_modules and ".lora_" not in name


def logits(model: nn.Module, ids: Sequence[int], spec: LoadSpec, last: int = 16) -> torch.Tensor:
    """Logits [min(last, n), vocabulary] of the last positions, fp32 on the CPU."""
    batch = torch.tensor([list(ids)], device=spec.device)
    with inference(model), spec.autocast():
        out: torch.Tensor = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
    return out[0, -last:].float().cpu().contiguous()


def peak_memory() -> dict[str, float]:
    """Peaks of this process so far, in GiB: resident, and on a GPU the allocator's."""
    peak = {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    if torch.cuda.is_available():
        peak["peak_gpu_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        peak["peak_gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return peak


def versions() -> dict[str, str]:
    """Installed versions of what took part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def conditions(device: str) -> dict[str, Any]:
    """Under which conditions the times were taken; what the driver won't tell is left out."""
    if device != "cuda":
        return {"device": platform.machine(), "threads": torch.get_num_threads(), "compute": "fp32"}
    seen: dict[str, Any] = {"device": torch.cuda.get_device_name(), "compute": "bf16"}
    probes = {
        "clock_mhz": torch.cuda.clock_rate,
        "temperature_c": torch.cuda.temperature,
        "power_w": lambda: torch.cuda.power_draw() / 1000,
    }
    for name, probe in probes.items():
        with contextlib.suppress(Exception):  # NVML answers NOT_SUPPORTED for some of these on GB10
            seen[name] = probe()
    return seen
