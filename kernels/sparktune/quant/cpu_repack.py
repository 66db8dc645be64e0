"""Keep bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

On such a CPU, `Linear4bit.forward` of bitsandbytes 0.50 rewrites the packed weight into another layout at the first
forward in eval mode without gradients (one `generate` is enough). `dequantize_4bit` still reads the old layout, so what
follows is wrong without an error: merging gives garbage, and training that is resumed gets wrong gradients. Layers
decide when they are *built*, by asking `has_avx512bf16` in bitsandbytes.nn.modules; answering no before the model is
built keeps the one layout everywhere. It costs the faster inference kernel, nothing else.
"""

from __future__ import annotations

import torch
from torch import nn


def keep_layout() -> None:
    """Make every Linear4bit that is built from now on keep its weights as they are stored. Idempotent."""
    import bitsandbytes.nn.modules as modules

    modules.has_avx512bf16 = _never


def _never() -> bool:
    return False


def assert_layout(model: nn.Module) -> int:
    """Count the 4-bit layers; raise RuntimeError if one is repacked already or would be at its next forward."""
    import bitsandbytes as bnb

    count = 0
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            count += 1
            state = getattr(module.weight, "quant_state", None)
            on_cpu = isinstance(module.weight, torch.Tensor) and module.weight.device.type == "cpu"
            repacked = bool(getattr(state, "packing_format_for_cpu", False))
            if repacked or (on_cpu and getattr(module, "support_avx512bf16_for_cpu", False)):
                raise RuntimeError(
                    f"{name} {'was' if repacked else 'would be'} repacked for AVX512-BF16, after which its weights "
                    "dequantise to garbage; call sparktune.quant.cpu_repack.keep_layout() before the model is built."
                )
    return count
