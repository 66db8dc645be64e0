"""FastLanguageModel: load, add LoRA, train, save, by the names, defaults and meanings that Unsloth's users know.

    from sparktune import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", max_seq_length=2048)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    ...                                         # TRL's SFTTrainer, transformers' Trainer, or a loop
    model.save_pretrained_merged("merged", tokenizer)
    print(FastLanguageModel.report(model))      # which modules run which op

It is thin: transformers loads, bitsandbytes stores, PEFT adapts, a stock trainer trains; sparktune's ops run inside
(`sparktune.models`), and the way out is `sparktune.export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparktune.interface import arguments, checkpointing, loading, lora, patching, saving
from sparktune.interface.choices import DEFAULT_LENGTH, pick_device, pick_dtype
from sparktune.interface.origin import transformers_model
from sparktune.models.patch import PatchReport
from sparktune.quant.dynamic.choice import Choice


class FastLanguageModel:
    """Static methods only; the models are transformers' and PEFT's own classes, with saving methods on the instance."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = DEFAULT_LENGTH,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool | str = "auto",
        dynamic: Choice | str | Path | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a causal language model, patch it, and return it with its tokenizer.

        model_name: a hub id or folder, taken exactly as given whatever `use_exact_model_name` says; of a LoRA adapter
            too, which comes back as a PeftModel over its base, ready to go on training.
        max_seq_length: tokens a sequence may have; kept as `model.max_seq_length` and the tokenizer's own limit.
        dtype: what is computed in; bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU.
        load_in_4bit: linear layers stored as NF4 with nested statistics; False, or `load_in_16bit`, keeps `dtype`.
        full_finetuning: every weight trains, in `dtype`; this switches the default of 4 bits off.
        device_map: the whole model goes to one device; spreading it puts hooks on modules that hide the ops.
        use_gradient_checkpointing: "unsloth" or "sparktune" (what is thought best), True (every layer), False.
        revision: branch, tag or commit of `model_name`.
        offload_embedding: True keeps the embedding's table in pinned host memory, from which a batch reads its tokens' rows;
            for a GPU with memory of its own, and a head that is not tied to it. "auto" and False keep it on the device.
        dynamic: which layers stay in 16 bits, as `sparktune.quant.dynamic` chose them, or the file it wrote.
        kwargs: attn_implementation, cache_dir, local_files_only, force_download.

        Errors: ValueError or TypeError, with the fix, for what is not supported.
        """
        arguments.refuse(
            "from_pretrained",
            load_in_8bit=load_in_8bit,
            resize_model_vocab=resize_model_vocab,
            rope_scaling=rope_scaling,
        )
        arguments.unknown("from_pretrained", kwargs, loading.MODEL_ARGUMENTS + loading.HUB_ARGUMENTS)
        if load_in_16bit and load_in_4bit and not full_finetuning:
            raise ValueError("load_in_16bit=True needs load_in_4bit=False: weights have one precision.")
        checkpointing.check(use_gradient_checkpointing)
        device = pick_device(device_map)
        request = loading.Request(
            name=str(model_name),
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            four_bit=load_in_4bit and not full_finetuning,
            dtype=pick_dtype(dtype, device),
            device=device,
            hub={k: kwargs[k] for k in loading.HUB_ARGUMENTS if k in kwargs},
            more={k: kwargs[k] for k in loading.MODEL_ARGUMENTS if k in kwargs},
            dynamic=loading.read_dynamic(dynamic, load_in_4bit and not full_finetuning),
            host_embedding=arguments.offload_embedding(offload_embedding, full_finetuning, device),
        )
        return loading.load(request, max_seq_length, full_finetuning, use_gradient_checkpointing, fix_tokenizer)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] = lora.ALL_LINEAR,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        target_parameters: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Freeze `model` and put LoRA around its `target_modules`: y + alpha / r * B A x. Returns PEFT's PeftModel.

        target_modules: names, "all-linear", or a regular expression; "embed_tokens" and "lm_head" are trained whole.
        lora_alpha, lora_dropout, bias, layers_*, use_rslora (alpha / sqrt(r)), modules_to_save, init_lora_weights,
            loftq_config, target_parameters and kwargs (such as use_dora): fields of PEFT's LoraConfig, with its meaning.
        use_gradient_checkpointing: as for `from_pretrained`; this one holds from now on.
        random_state: the seed that the LoRA matrices start from; the process's own generators stay as they are.
        max_seq_length: at most what the model was loaded with.

        Errors: ValueError or TypeError, with the fix, for what is not supported.
        """
        checkpointing.check(use_gradient_checkpointing)
        loaded = getattr(model, "max_seq_length", None)
        if max_seq_length is not None and loaded is not None and max_seq_length > loaded:
            raise ValueError(
                f"get_peft_model(max_seq_length={max_seq_length}) is more than the {loaded} that the model was loaded "
                "with: give it to from_pretrained."
            )
        if r < 1:
            raise ValueError(f"r={r} is not a rank: use 1 or more.")
        if loftq_config:
            kwargs["loftq_config"] = loftq_config
        wrapped = lora.add_lora(
            model,
            target_modules,
            modules_to_save,
            random_state,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            target_parameters=target_parameters,
            **kwargs,
        )
        if max_seq_length is not None:
            transformers_model(wrapped).max_seq_length = max_seq_length
        patching.patch(wrapped)
        checkpointing.apply(wrapped, use_gradient_checkpointing)
        saving.attach(wrapped)
        return wrapped

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode, with the checkpointing chosen before unless another is given. Returns `model`."""
        chosen = checkpointing.chosen(model) if use_gradient_checkpointing is None else use_gradient_checkpointing
        checkpointing.apply(model, chosen)
        transformers_model(model).config.use_cache = False
        return model.train()

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode with the key-value cache and without checkpointing. Returns `model`."""
        checkpointing.pause(model)
        transformers_model(model).config.use_cache = True
        return model.eval()

    @staticmethod
    def report(model: nn.Module) -> PatchReport:
        """What runs which op, and what was left and why. Raises ValueError for a model that sparktune did not load."""
        return patching.report(model)
