"""What a training run will take of memory, before a byte of the model is loaded.

For a dense decoder `sparktune.planning.plan` predicts the peak of a step without checkpointing; to that come the embedding and
the head once more, which are held in fp32 where gradients are compared closely, what is not in the plan (norms, a vision tower)
in 16 bits, and the CUDA context. A model with experts is loaded in 16 bits before its experts are quantised, so all of its
parameters in 16 bits are what it needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.results import ReasonClass
from sparkproof.scenario import TrainScenario

GIB = 2.0**30
CONTEXT_GIB = 1.5  # CUDA's own, and what the allocator can't hand out; an H100's context alone is about 0.5


def needed_gib(config: Any, s: TrainScenario, context: float = CONTEXT_GIB) -> float:
    """GiB that training `config` (a transformers configuration) with the scenario's sizes takes on its device."""
    from sparktune.planning import ModelShape, plan

    parameters = _parameters(config)
    try:
        shape = ModelShape.of(config)
    except ValueError:  # experts or latent attention
        return 2 * parameters / GIB + context
    step = plan(
        shape, batch=s.batch, sequence=s.seq_len, rank=s.lora.rank, checkpointing=False, load_in_4bit=s.load_in_4bit
    )
    planned = shape.layer_weights * shape.layers + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    besides = step.bytes["embedding and head"] + 2 * max(0, parameters - planned)
    return (step.peak + besides) / GIB + context


def _parameters(config: Any) -> int:
    """Of the architecture, without memory for any."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def available_gib() -> float:
    """Memory of the device that training will use: the pool where it is shared, else the GPU's own; without one, the host's."""
    import psutil
    import torch

    if torch.cuda.is_available() and not torch.cuda.get_device_properties(0).is_integrated:
        return float(torch.cuda.mem_get_info()[0] / GIB)
    return float(psutil.virtual_memory().available / GIB)


def need_memory(folder: Path, s: TrainScenario, available: float | None = None) -> float:
    """GiB needed by the model in `folder`. Errors: UserError (skip class 'memory') where less is available now."""
    import torch
    from transformers import AutoConfig

    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config  # it is dequantised when it is loaded
    else:
        config = AutoConfig.from_pretrained(folder)
    needed = needed_gib(config, s, CONTEXT_GIB if torch.cuda.is_available() else 0.0)
    have = available_gib() if available is None else available
    if have < needed:
        raise UserError(
            f"Training {s.model} needs {needed:.1f} GiB of memory by prediction, and {have:.1f} GiB are available.",
            "Free memory, or lower batch and seq_len in the scenario.",
            skip_class=ReasonClass.MEMORY.value,
        )
    return needed
