"""What the harness asks of an engine, and what it does itself so that engines stay comparable.

An engine loads the base, adds LoRA, saves, reads back and generates, each in its own way. The same for all, and done
here: LoRA's initial values (seeded by parameter name), the batches, the optimiser and the learning-rate schedule.
On a CPU the base is NF4 and computation is fp32; on a GPU the base is NF4 and computation is bf16 under autocast.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from sparkproof.errors import UserError
from sparkproof.results import ReasonClass


class EngineUnavailable(UserError):
    """The engine can't run here; a case that wants it is skipped, by default as not installed."""

    def __init__(self, message: str, fix: str, reason: ReasonClass = ReasonClass.ENGINE) -> None:
        super().__init__(message, fix, skip_class=reason.value)


def require_on_gpu(name: str, package: str, install: str) -> None:
    """Raise EngineUnavailable with the cure where the engine `name` lacks its Python package or a GPU."""
    if importlib.util.find_spec(package) is None:
        raise EngineUnavailable(
            f"{name} is not installed, so nothing was trained with it.",
            f"pip install {install}, or choose --engine sparktune or --engine hf.",
            ReasonClass.ENGINE,
        )
    if not torch.cuda.is_available():
        raise EngineUnavailable(
            f"{name} needs a GPU that torch can use, and there is none.",
            "Choose --engine sparktune or --engine hf.",
            ReasonClass.GPU,
        )


@dataclass(frozen=True)
class LoadSpec:
    """How a base model is to be loaded."""

    folder: Path
    load_in_4bit: bool
    seq_len: int
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    compute: Literal["fp32", "bf16"] = "fp32"
    device: str = field(default_factory=lambda: native_device())
    checkpointing: bool = False  # recompute activations in backward, each engine in its own way

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in, and what is not quantised is stored in."""
        return torch.bfloat16 if self.compute == "bf16" else torch.float32

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """bf16 autocast where that is what is computed in, nothing otherwise."""
        if self.compute == "bf16":
            with torch.autocast(self.device, dtype=torch.bfloat16):
                yield
        else:
            yield


def native_device() -> str:
    """Where training runs here: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def native_compute() -> Literal["fp32", "bf16"]:
    """What training runs in here: bf16 on a GPU, fp32 on a CPU."""
    return "bf16" if torch.cuda.is_available() else "fp32"


@dataclass
class Ran:
    """What really ran: the engine's own account, for the record."""

    mode: str  # gpu, reference, host
    patches: dict[str, Any] = field(default_factory=dict)
    watermarks: dict[str, dict[str, int]] = field(default_factory=dict)


class Engine(Protocol):
    """One way to fine-tune. `load` comes first, then either `add_lora` or `read_adapter`."""

    name: str
    promises_repeat: bool  # two fresh processes give the same losses bit for bit
    has_fp32: bool  # can compute in fp32 on any device, where gradients are compared closely

    def load(self, spec: LoadSpec) -> tuple[nn.Module, Any]:
        """The base model on its device, and its tokenizer."""
        ...

    def add_lora(self, model: nn.Module, spec: LoadSpec) -> nn.Module:
        """The model with trainable LoRA layers and everything else frozen."""
        ...

    def save_adapter(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter in PEFT's format."""
        ...

    def read_adapter(self, model: nn.Module, folder: Path, spec: LoadSpec) -> nn.Module:
        """The base model with a saved adapter, trainable."""
        ...

    def generate(self, model: nn.Module, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of `prompt`, without the prompt."""
        ...

    def optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """What `optim="adamw_8bit"` gives this engine's users, without weight decay."""
        ...

    def ran(self, model: nn.Module) -> Ran:
        """What ran since the model was loaded."""
        ...


def adamw_8bit(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit AdamW on a GPU, PyTorch's AdamW on a CPU, where the former has no step."""
    if parameters[0].device.type == "cuda":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=0.0)  # type: ignore[no-any-return]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA's A and B by canonical name ('layers.0.self_attn.q_proj.lora_A'), whatever wrappers an engine adds."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parts = [p for p in name.split(".") if p not in ("base_model", "model", "default", "weight")]
            found[".".join(parts)] = parameter
    return dict(sorted(found.items()))


@torch.no_grad()
def seed_lora(model: nn.Module, seed: int, b_scale: float = 0.0) -> None:
    """Give LoRA values that depend on (seed, name, shape) alone: the same for every engine, process and machine.

    A is uniform in +-1/sqrt(in), PEFT's own default; B is zero, or normal with `b_scale` where a comparison needs every
    gradient to be non-zero (with B = 0 the gradient of A is exactly zero).
    """
    for name, parameter in lora_parameters(model).items():
        key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
        generator = torch.Generator().manual_seed(key)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(parameter.shape[1])
            value = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
        else:
            value = (
                torch.randn(parameter.shape, generator=generator) * b_scale if b_scale else torch.zeros_like(parameter)
            )
        parameter.copy_(value)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before is given back."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def greedy(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """transformers' own greedy `generate`, for engines whose models have it."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    with inference(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return [int(token) for token in out[0, len(prompt) :]]
