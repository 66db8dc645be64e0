"""The reference engine: transformers, PEFT and bitsandbytes as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparkproof.engines.base import LoadSpec, Ran, adamw_8bit, greedy
from sparkproof.engines.marks import Launches


class HfEngine:
    """Plain transformers + PEFT + bitsandbytes; the others are compared with it."""

    name = "hf"
    promises_repeat = True
    has_fp32 = True
    launches: Launches | None = None

    def load(self, spec: LoadSpec) -> tuple[nn.Module, Any]:
        """Load with NF4 and nested statistics, after bitsandbytes' in-place repacking is switched off.

        transformers leaves experts in 16 bits; here they go into NF4 by bitsandbytes' own parametrisation, so that every
        engine trains over the same base. A checkpoint with experts in MXFP4, which has no gradients, is dequantised first.
        """
        from sparktune.quant.cpu_repack import assert_layout, keep_layout
        from sparktune.quant.experts import quantise_experts
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
        from transformers.utils.quantization_config import Mxfp4Config

        keep_layout()
        stored = getattr(AutoConfig.from_pretrained(spec.folder), "quantization_config", None) or {}
        mxfp4 = stored.get("quant_method") == "mxfp4"
        ready = stored.get("quant_method") == "bitsandbytes"  # a checkpoint of NF4 is loaded as it is stored
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=spec.dtype,
        )
        chosen = Mxfp4Config(dequantize=True) if mxfp4 else quantization if spec.load_in_4bit else None
        model = AutoModelForCausalLM.from_pretrained(
            spec.folder,
            dtype=spec.dtype,
            device_map={"": spec.device},
            **({} if ready else {"quantization_config": chosen}),
        )
        assert_layout(model)
        if spec.load_in_4bit:
            quantise_experts(model)
        self.launches = Launches()
        return model, AutoTokenizer.from_pretrained(spec.folder)

    def add_lora(self, model: nn.Module, spec: LoadSpec) -> nn.Module:
        """PEFT's LoRA without dropout, so that engines can be compared."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]
            target_modules=list(spec.target_modules),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        lora: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        if spec.checkpointing:
            lora.config.use_cache = False
            lora.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return lora  # type: ignore[no-any-return]

    def save_adapter(self, model: nn.Module, folder: Path) -> None:
        """PEFT's save_pretrained."""
        model.save_pretrained(folder)  # type: ignore[operator]

    def read_adapter(self, model: nn.Module, folder: Path, spec: LoadSpec) -> nn.Module:
        """PEFT's from_pretrained over a base that was just loaded."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder, is_trainable=True)  # type: ignore[arg-type]

    def generate(self, model: nn.Module, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
        """Greedy generation with the cache."""
        return greedy(model, tokenizer, prompt, max_new_tokens)

    def optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """bitsandbytes'."""
        return adamw_8bit(parameters, learning_rate)

    def ran(self, model: nn.Module) -> Ran:
        """Nothing is patched; Triton kernels of the other engines' packages would show among the launches."""
        on_gpu = torch.cuda.is_available()
        return Ran(mode="gpu" if on_gpu else "host", watermarks=self.launches.foreign() if self.launches else {})
