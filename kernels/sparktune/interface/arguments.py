"""What the interface refuses: an argument that does nothing here is an error with the fix, never ignored.

Names and defaults are those of Unsloth's public signatures (docs.unsloth.ai, 2026.10), so a call that leaves such an
argument at its default means the same here.
"""

from __future__ import annotations

from typing import Any

import torch

from sparktune.models import offload

_VLLM = "sparktune generates with transformers; save the model and serve it with vLLM"
# name -> (values that ask for nothing, what to do instead)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "load_in_8bit": ((False,), "use load_in_4bit=True, or load_in_4bit=False for 16 bits"),
    "load_in_fp8": ((False,), "use load_in_4bit=True, or load_in_4bit=False for 16 bits"),
    "resize_model_vocab": (
        (None,),
        "call model.resize_token_embeddings(n) on the loaded model and train modules_to_save=['embed_tokens', "
        "'lm_head']",
    ),
    "rope_scaling": (
        (None,),
        "set rope_parameters in the checkpoint's config.json, which every later load and export reads",
    ),
    "float32_mixed_precision": (
        (None, False),
        "use dtype=torch.float32, and the trainer's bf16=True to compute in bf16",
    ),
    "random_state": ((3407,), "loading draws no random numbers: give it to get_peft_model"),
    "fast_inference": ((False,), _VLLM),
    "gpu_memory_utilization": ((0.5, 0.6, None), _VLLM),
    "float8_kv_cache": ((False,), _VLLM),
    "max_lora_rank": ((64, 16, None), f"give r to get_peft_model; {_VLLM}"),
    "disable_log_stats": ((True,), _VLLM),
    "unsloth_vllm_standby": ((False,), _VLLM),
    "unsloth_tiled_mlp": ((False,), "leave it out: the MLP is fused already"),
    "qat_scheme": ((None,), "train with load_in_4bit=True and quantise the merged model"),
    "temporary_location": (
        ("_unsloth_temporary_saved_buffers",),
        "leave it out: nothing is offloaded to disk",
    ),
    "maximum_memory_usage": ((0.75, 0.85, 0.9), "leave it out: weights are merged one tensor at a time"),
    "state_dict": ((None,), "leave it out: the model's own weights are saved"),
    "save_function": ((None,), "leave it out: weights are saved as safetensors"),
    "safe_serialization": ((True, None), "leave it out: weights are saved as safetensors"),
    "variant": ((None,), "leave it out"),
    "save_peft_format": ((True,), "leave it out: adapters are saved in PEFT's format"),
    "is_main_process": ((True,), "call it in the main process only"),
    "max_shard_size": (("5GB",), "leave it out: merged weights keep the base's shards"),
    "first_conversion": ((None,), "leave it out: the file is written in the asked type at once"),
    "commit_description": ((None,), "give commit_message"),
    "create_pr": ((False,), "push, or upload the saved folder with huggingface_hub's upload_folder(create_pr=True)"),
}


def refuse(function: str, **given: Any) -> None:
    """Raise ValueError for the first of `given` (name=value, names of REFUSED) that asks for something."""
    for name, value in given.items():
        harmless, fix = REFUSED[name]
        if not any(value is h or (type(value) is type(h) and value == h) for h in harmless):
            raise ValueError(f"{function}({name}={value!r}) is not supported: {fix}.")


def unknown(function: str, given: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """For **kwargs: refuse what REFUSED knows, raise TypeError for any other name that is not `known`."""
    refuse(function, **{name: value for name, value in given.items() if name in REFUSED})
    lost = [name for name in given if name not in REFUSED and name not in known]
    if lost:
        also = f" Besides the named arguments it takes {', '.join(known)}." if known else ""
        raise TypeError(f"{function}() does not know the argument {lost[0]!r}: leave it out.{also}")


def offload_embedding(value: bool | str, full_finetuning: bool, device: torch.device) -> bool:
    """Whether `value` asks for an embedding in host memory.

    Errors: ValueError for another word, where it is trained, and on a device where it frees nothing.
    """
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(f"offload_embedding={value!r} is not known: use True, False or 'auto' (on the device).")
    if value is True:
        if full_finetuning:
            raise ValueError("offload_embedding=True and full_finetuning=True exclude each other: what trains stays.")
        offload.refuse(device, "the embedding", "offload_embedding")
    return value is True
