"""PEFT's LoRA around a loaded model: which modules it adapts, how its matrices start, what else is trained."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparktune.interface import arguments, checkpointing
from sparktune.interface.origin import origin_of, remember
from sparktune.quant.experts import as_plain

LOG = logging.getLogger("sparktune")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINED_WHOLE = ("embed_tokens", "lm_head")


def add_lora(
    model: Any, target_modules: str | Sequence[str], modules_to_save: Sequence[str] | None, seed: int, **config: Any
) -> Any:
    """`model` frozen, inside a PeftModel whose LoRA matrices start from `seed`. Errors: ValueError, TypeError.

    `config` holds fields of PEFT's LoraConfig.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    origin = origin_of(model)
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model has LoRA layers already: train it as it is, or give get_peft_model a model that "
            "from_pretrained just loaded."
        )
    if origin.full_finetuning:
        raise ValueError(
            "The model was loaded with full_finetuning=True, which trains every weight: leave out get_peft_model, or "
            "load it without full_finetuning."
        )
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    lost = [name for name in config if name not in fields]
    arguments.unknown("get_peft_model", {name: config[name] for name in lost})
    config.setdefault("revision", origin.revision)  # of the base: without it the adapter reloads over its newest commit
    targets, whole = _targets(model, target_modules, list(modules_to_save or []))
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, modules_to_save=whole or None,
        **{name: value for name, value in config.items() if name in fields},
    )  # fmt: skip
    # PEFT makes the embedding's output need a gradient where checkpointing is on; only the re-entrant kind needs that.
    checkpointing.pause(model)
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        with as_plain(model):
            wrapped: Any = get_peft_model(model, lora)
    remember(wrapped, origin)
    return wrapped


def _targets(model: nn.Module, asked: str | Sequence[str], whole: list[str]) -> tuple[str | list[str], list[str]]:
    """PEFT's `target_modules` and `modules_to_save`. Errors: ValueError for a name that no module has.

    As Unsloth's users know it, `embed_tokens` and `lm_head` among the targets are trained whole, not by LoRA.
    """
    if isinstance(asked, str):
        return asked, whole  # "all-linear" or a regular expression; PEFT refuses one that fits nothing
    names = [name for name, _ in model.named_modules()]
    targets = [t for t in asked if t not in TRAINED_WHOLE]
    whole = whole + [t for t in asked if t in TRAINED_WHOLE and t not in whole]
    missing = [t for t in targets if not _has(names, t)]
    absent = missing if tuple(asked) != ALL_LINEAR else []
    absent = absent + [t for t in whole if not _has(names, t)]
    if absent:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if "Linear" in type(m).__name__})
        raise ValueError(
            f"The model has no module named {absent[0]!r}: use target_modules='all-linear' or names among "
            f"{', '.join(linear)}."
        )
    if missing:
        LOG.warning("The model has no %s: LoRA goes to every linear layer but the head.", ", ".join(missing))
        return "all-linear", whole
    return targets, whole


def _has(names: list[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
