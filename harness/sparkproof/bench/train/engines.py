"""How each engine's model is built over the same checkpoint, as its users would. Imports stay inside: one engine a process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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


def first_import(name: str) -> None:
    """Import what must come before torch and transformers. Errors: NotInstalled."""
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(
            f"no package {package} here; if it lies in a folder of its own, name that: --site {name}=DIR"
        )
    if name == "unsloth":
        import unsloth  # noqa: F401


def refusal(name: str, device: str) -> str:
    """Why an engine can't run on a kind of device, or ""."""
    return "its kernels need a CUDA GPU" if device != "cuda" and name in ("liger", "unsloth") else ""


def build(name: str, folder: str, s: Setting) -> Built:
    """Build one engine. Errors: RuntimeError where not all its projections are in 4 bits; whatever the engine raises."""
    built = {"hf": _hf, "liger": _liger, "unsloth": _unsloth, "sparktune": _sparktune}[name](folder, s)
    found, wanted = _quantised(built.model), len(TARGETS) * s.layers
    if found != wanted:
        raise RuntimeError(f"{found} of its linear layers are in 4 bits, {wanted} should be")
    if not built.params:
        built.params = [p for p in built.model.parameters() if p.requires_grad]
    return built


def _hf(folder: str, s: Setting) -> Built:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0 if s.device == "cuda" else "cpu"}, attn_implementation="sdpa",
        local_files_only=True,
    )  # fmt: skip
    model.config.use_cache = False
    lora = LoraConfig(
        r=s.rank, lora_alpha=s.alpha, lora_dropout=0.0, bias="none", target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    if s.gc == "on":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _cast(model, s)
    model.train()

    def step(ids: Any, labels: Any, positions: Any, lengths: Any) -> Any:
        packed = {} if positions is None else {"position_ids": positions}
        return model(input_ids=ids, labels=labels, use_cache=False, **packed).loss

    return Built(model, step)


def _liger(folder: str, s: Setting) -> Built:
    from liger_kernel.transformers import monkey_patch

    apply = getattr(monkey_patch, f"apply_liger_kernel_to_{s.shape.kind}")
    apply(rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True)
    return _hf(folder, s)


def _unsloth(folder: str, s: Setting) -> Built:
    from unsloth import FastLanguageModel  # isort: skip - before torch
    import torch

    checkpointing = "unsloth" if s.gc == "on" else False
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=s.rows()[1], dtype=torch.bfloat16, load_in_4bit=True, use_exact_model_name=True,
        local_files_only=True, fix_tokenizer=False, device_map={"": 0}, use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=s.rank, lora_alpha=s.alpha, lora_dropout=0.0, bias="none", target_modules=list(TARGETS),
        use_gradient_checkpointing=checkpointing, random_state=s.seed,
    )  # fmt: skip
    model = FastLanguageModel.for_training(model) or model
    _cast(model, s)

    def step(ids: Any, labels: Any, positions: Any, lengths: Any) -> Any:
        packed = {}
        if positions is not None:
            of = torch.tensor(lengths, dtype=torch.int32, device=ids.device)
            packed = {"position_ids": positions, "packed_seq_lengths": of}
        out = model(input_ids=ids, labels=labels, use_cache=False, **packed)
        return out.loss if hasattr(out, "loss") else out[0]

    return Built(model, step, notes=lambda: {n: n in sys.modules for n in ("xformers", "flash_attn")})


def _sparktune(folder: str, s: Setting) -> Built:
    from sparkproof.bench import yardstick

    os.environ[yardstick.BUDGET], os.environ[yardstick.OFFLOAD] = str(s.memory_budget_gib), str(int(s.offload))
    made = yardstick.build(folder, s)
    return Built(made["model"], made["step"], made["params"], lambda: dict(made["notes"].items()))


def _cast(model: Any, s: Setting) -> None:
    import torch

    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.float32 if s.lora_dtype == "fp32" else torch.bfloat16)


def _quantised(model: Any) -> int:
    from bitsandbytes.nn import Linear4bit  # PEFT wraps it in a class of the same name

    return sum(isinstance(m, Linear4bit) for m in model.modules())
