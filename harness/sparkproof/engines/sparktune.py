"""Our own library as an engine: the same stack with sparktune's ops inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparkproof.engines.base import LoadSpec, Ran
from sparkproof.engines.hf import HfEngine


class SparktuneEngine(HfEngine):
    """FastLanguageModel; saving, reading back and generating are PEFT's and transformers', as for `hf`."""

    name = "sparktune"

    def load(self, spec: LoadSpec) -> tuple[nn.Module, Any]:
        """Load and patch; the counters of what runs start from zero here."""
        from sparktune import FastLanguageModel
        from sparktune.models.projection import reset_fallbacks
        from sparktune.ops import dispatch

        loaded = FastLanguageModel.from_pretrained(
            spec.folder,
            max_seq_length=None,
            load_in_4bit=spec.load_in_4bit,
            dtype=spec.dtype,
            device_map={"": spec.device},
            use_gradient_checkpointing=False,  # add_lora says
        )
        dispatch.reset()
        reset_fallbacks()
        return loaded

    def add_lora(self, model: nn.Module, spec: LoadSpec) -> nn.Module:
        """LoRA by the library's own call."""
        from sparktune import FastLanguageModel

        lora: nn.Module = FastLanguageModel.get_peft_model(
            model,
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=spec.target_modules,
            use_gradient_checkpointing=spec.checkpointing,
        )
        return lora

    def optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """The library's own 8-bit AdamW, all tensors in two launches."""
        from sparktune.optim import AdamW8bit

        if parameters[0].device.type != "cuda":
            return super().optimizer(parameters, learning_rate)
        return AdamW8bit(parameters, lr=learning_rate, weight_decay=0.0)

    def ran(self, model: nn.Module) -> Ran:
        """The patch report, calls that ran module by module, and per op how often a kernel or something else ran."""
        from sparktune import FastLanguageModel
        from sparktune.models.projection import fallbacks
        from sparktune.ops import dispatch

        return Ran(
            mode="gpu" if torch.cuda.is_available() else "reference",
            patches={**FastLanguageModel.report(model).to_json(), "fallbacks": fallbacks()},
            watermarks={op: {str(way): n for way, n in ways.items()} for op, ways in dispatch.watermarks().items()},
        )
