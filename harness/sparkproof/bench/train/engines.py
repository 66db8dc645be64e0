"""How each engine's model is built over the same checkpoint, as its users would. Imports stay inside: one engine a process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkproof.bench.train.setting import TARGETS, Setting

Step = Callable[..., Any]  # (ids, labels, positions or None, lengths or None) -> the loss before its backward pass
PACKAGES = {"hf": "peft", "liger": "liger_kernel", "unsloth": "unsloth", "sparktune": "sparktune"}


class NotInstalled(Exception):
    """The engine can't be had here; the message says why, and what would help."""


@dataclass
class Built:
    """A model that is ready to train; `notes` are asked after the steps."""

    model: Any
    step: Step
    params: list[Any] = field(default_factory=list)
    notes: Callable[[], dict[str, Any]] = dict
    ran: Callable[[], dict[str, Any]] | None = None  # `engines.base.Ran` as a dict, asked after the steps


def first_import(name: str) -> None:
    """Import what must come before torch and transformers. Errors: NotInstalled."""
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(
            f"no package {package} here; if it lies in a folder of its own, name that: --site {name}=DIR"
        )
    if name == "unsloth":  # before the registry, which imports torch
        import unsloth  # noqa: F401


def refusal(name: str, device: str) -> str:
    """Why an engine can't run on a kind of device, or ""."""
    return "its kernels need a CUDA GPU" if device != "cuda" and name in ("liger", "unsloth") else ""


def build(name: str, folder: str, s: Setting) -> Built:
    """Build one engine. Errors: RuntimeError where not all its projections are in 4 bits; whatever the engine raises."""
    built = _sparktune(folder, s) if name == "sparktune" else _adapter(name, folder, s)
    found, wanted = _quantised(built.model), len(TARGETS) * s.layers
    if found != wanted:
        raise RuntimeError(f"{found} of its linear layers are in 4 bits, {wanted} should be")
    if not built.params:
        built.params = [p for p in built.model.parameters() if p.requires_grad]
    return built


def _adapter(name: str, folder: str, s: Setting) -> Built:
    """The engine that training cases use, over the prepared checkpoint. What it launched is among the notes."""
    import torch

    from sparkproof.engines import registry
    from sparkproof.engines.base import LoadSpec

    engine = registry.engine(name)
    spec = LoadSpec(
        Path(folder), True, s.rows()[1], s.rank, s.alpha, TARGETS, "bf16", s.device, checkpointing=s.gc == "on"
    )
    model: Any = engine.add_lora(engine.load(spec)[0], spec)
    model.config.use_cache = False
    _cast(model, s)
    model.train()

    def step(ids: Any, labels: Any, positions: Any, lengths: Any) -> Any:
        packed = {} if positions is None else {"position_ids": positions}
        if packed and name == "unsloth":
            packed["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=ids.device)
        out = model(input_ids=ids, labels=labels, use_cache=False, **packed)
        return out.loss if hasattr(out, "loss") else out[0]

    def notes() -> dict[str, Any]:
        kept = {"launches": engine.ran(model).watermarks}
        return kept | ({n: n in sys.modules for n in ("xformers", "flash_attn")} if name == "unsloth" else {})

    return Built(model, step, notes=notes, ran=lambda: vars(engine.ran(model)))


def _sparktune(folder: str, s: Setting) -> Built:
    from sparkproof.bench import yardstick
    from sparkproof.engines.sparktune import SparktuneEngine

    os.environ[yardstick.BUDGET], os.environ[yardstick.OFFLOAD] = str(s.memory_budget_gib), str(int(s.offload))
    os.environ[yardstick.EMBEDDING] = str(int(s.offload_embedding))
    made = yardstick.build(folder, s)
    model = made["model"]
    return Built(
        model,
        made["step"],
        made["params"],
        lambda: dict(made["notes"].items()),
        lambda: vars(SparktuneEngine().ran(model)),
    )


def _cast(model: Any, s: Setting) -> None:
    import torch

    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.float32 if s.lora_dtype == "fp32" else torch.bfloat16)


def _quantised(model: Any) -> int:
    from bitsandbytes.nn import Linear4bit  # PEFT wraps it in a class of the same name

    return sum(isinstance(m, Linear4bit) for m in model.modules())
