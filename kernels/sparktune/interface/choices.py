"""Device, dtype and length: what `from_pretrained` chooses where it is not told, and what it refuses."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

LOG = logging.getLogger("sparktune")
DEFAULT_LENGTH = 2048
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def is_bfloat16_supported() -> bool:
    """Whether this machine's GPU computes in bf16 by itself, Ampere's and later ones: for a trainer's `bf16=`."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def pick_device(device_map: Any) -> torch.device:
    """The one device of `device_map`. Errors: ValueError for a map over several.

    None, "sequential" and "auto" are the process's own GPU (LOCAL_RANK under a launcher) or the CPU.
    """
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise ValueError(
                f"device_map={device_map!r} spreads the model: sparktune keeps it whole on one device. Use "
                "device_map={'': 'cuda:0'}, or `accelerate launch` for one copy a GPU."
            )
        device_map = device_map[""]
    if device_map in (None, "sequential", "auto"):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r} is not a device: use 'sequential' (the whole model on this process's GPU), "
            "'cuda:0' or 'cpu'."
        ) from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device_map={device_map!r} is not supported: use 'cuda' or 'cpu'.")
    return device


def pick_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """What is computed in: bf16 on a GPU that has it (fp16 on others), fp32 on a CPU, unless given. Errors: ValueError."""
    if dtype is None or dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if is_bfloat16_supported() else torch.float16
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is not supported: use None, torch.bfloat16, torch.float16 or torch.float32.")
    return found


def usable_length(asked: int | None, config: Any) -> int:
    """`max_seq_length` against the model's context. Errors: ValueError where it is longer, unless it is the default."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return int(context or DEFAULT_LENGTH)
    if asked < 1:
        raise ValueError(f"max_seq_length={asked} is not a length: use 1 or more, or None for the model's context.")
    if context is None or asked <= context:
        return int(asked)
    if asked == DEFAULT_LENGTH:
        LOG.warning("max_seq_length=%d is longer than the model's context: %d is used.", asked, context)
        return int(context)
    raise ValueError(
        f"max_seq_length={asked} is longer than the model's context of {context}: use {context} or less, or a checkpoint "
        "whose config.json scales RoPE."
    )
