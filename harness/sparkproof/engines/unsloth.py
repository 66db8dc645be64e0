"""Unsloth as an engine, where it is installed: its own loader, its own LoRA call, its own patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparkproof.engines.base import LoadSpec, Ran, adamw_8bit, inference, require_on_gpu
from sparkproof.engines.marks import Launches

BLOCK = "_unsloth_block_compiled"  # what Unsloth marks the forward of a layer with that it has torch.compile make


class UnslothEngine:
    """unsloth.FastLanguageModel. It compiles code at import and load, and promises no bit-for-bit repeat."""

    name = "unsloth"
    promises_repeat = False
    has_fp32 = False
    launches: Launches | None = None

    def load(self, spec: LoadSpec) -> tuple[nn.Module, Any]:
        """Load through Unsloth; without the package or without a GPU, say so."""
        require_unsloth()
        from unsloth import FastLanguageModel

        loaded: tuple[nn.Module, Any] = FastLanguageModel.from_pretrained(
            str(spec.folder),
            max_seq_length=spec.seq_len,
            load_in_4bit=spec.load_in_4bit,
            dtype=spec.dtype,
            use_exact_model_name=True,  # a folder must not be replaced by a repository of a like name
            local_files_only=True,
            fix_tokenizer=False,
            device_map={"": 0},
            use_gradient_checkpointing="unsloth" if spec.checkpointing else False,
        )
        self.launches = Launches()
        return loaded

    def add_lora(self, model: nn.Module, spec: LoadSpec) -> nn.Module:
        """Unsloth's get_peft_model, then its training mode."""
        from unsloth import FastLanguageModel

        lora: Any = FastLanguageModel.get_peft_model(
            model,
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=list(spec.target_modules),
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth" if spec.checkpointing else False,
        )
        return FastLanguageModel.for_training(lora) or lora

    def save_adapter(self, model: nn.Module, folder: Path) -> None:
        """The PEFT format."""
        model.save_pretrained(folder)  # type: ignore[operator]

    def read_adapter(self, model: nn.Module, folder: Path, spec: LoadSpec) -> nn.Module:
        """Fresh LoRA layers, then the saved tensors into them; a name that fits nowhere is an error."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        model = self.add_lora(model, spec)
        result: Any = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))  # type: ignore[arg-type]
        if result.unexpected_keys:
            raise RuntimeError(f"{len(result.unexpected_keys)} saved tensors fit nowhere: {result.unexpected_keys[0]}")
        return model

    def generate(self, model: nn.Module, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
        """Greedy generation between Unsloth's for_inference and for_training."""
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        try:
            with inference(model):
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
        finally:
            FastLanguageModel.for_training(model)
        return [int(token) for token in out[0, len(prompt) :]]

    def optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """bitsandbytes'."""
        return adamw_8bit(parameters, learning_rate)

    def ran(self, model: nn.Module) -> Ran:
        """Where the model's classes come from, and how often which of Unsloth's kernels was launched."""
        ours = {type(m).__module__.split(".")[0] for m in model.modules()}
        kind = getattr(getattr(model, "config", None), "model_type", "")
        marks = self.launches.of("unsloth") | self.launches.of("unsloth_zoo") if self.launches else {}
        blocks = {type(m).__name__ for m in model.modules() if hasattr(type(m).forward, BLOCK)}
        patches = {"modules from": sorted(ours), "family": kind, "compiled whole": sorted(blocks)}
        return Ran(mode="gpu", patches=patches, watermarks=marks)


def require_unsloth() -> None:
    """Raise EngineUnavailable with the cure where Unsloth can't run."""
    require_on_gpu("Unsloth", "unsloth", "unsloth==2026.10.7")
