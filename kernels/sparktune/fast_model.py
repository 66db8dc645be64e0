"""FastLanguageModel: load, add LoRA, save, by the names that users of Unsloth know.

    model, tokenizer = FastLanguageModel.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    print(FastLanguageModel.report(model))      # which modules run which op

It is thin: transformers loads, bitsandbytes stores, PEFT adapts; sparktune's ops run inside (`sparktune.models`). A
family that sparktune has no rules for raises `UnknownFamilyError` instead of running without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparktune.models.patch import REPORT_ATTRIBUTE, PatchReport, patch_model
from sparktune.quant.cpu_repack import assert_layout, keep_layout

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastLanguageModel:
    """Static methods only; the models are transformers' and PEFT's own classes."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        *,
        revision: str | None = None,
        load_in_4bit: bool = True,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> tuple[nn.Module, Any]:
        """Load, quantise and patch a causal language model; return it with its tokenizer.

        `dtype` is what is computed in: bf16 on a GPU and fp32 on a CPU unless given. With `load_in_4bit` the linear
        layers are stored as NF4 with nested statistics. The whole model goes to one `device`: spreading it puts hooks
        on the modules that hide the ops, and on a GPU that shares the host's memory it saves nothing.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        keep_layout()
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_name,
            revision=revision or "main",
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization if load_in_4bit else None,
        )
        patch_model(model)
        assert_layout(model)
        return model, AutoTokenizer.from_pretrained(model_name, revision=revision or "main")

    @staticmethod
    def get_peft_model(
        model: nn.Module,
        r: int = 16,
        lora_alpha: float = 16,
        target_modules: Sequence[str] = ALL_LINEAR,
        lora_dropout: float = 0.0,
    ) -> Any:
        """Freeze `model` and put LoRA layers around its `target_modules`: y + alpha / r * B A x."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]
            target_modules=list(target_modules),
            lora_dropout=lora_dropout,
            bias="none",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)  # type: ignore[arg-type]

    @staticmethod
    def report(model: nn.Module) -> PatchReport:
        """What `from_pretrained` patched. Raises ValueError for a model that sparktune did not load."""
        for module in model.modules():
            found = getattr(module, REPORT_ATTRIBUTE, None)
            if isinstance(found, PatchReport):
                return found
        raise ValueError("This model was not patched by sparktune.")
