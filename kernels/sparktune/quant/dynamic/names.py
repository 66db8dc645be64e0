"""Tensor names: the checkpoint's own and llama.cpp's, by the table of the `gguf` library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# transformers' model_type where llama.cpp's name differs
_ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
}  # fmt: skip


def gguf_namer(config: Any) -> Callable[[str], str]:
    """A function from the checkpoint's tensor name to llama.cpp's. Errors: ValueError for what llama.cpp has no place for."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    text = config.get_text_config()
    wanted = _ARCHITECTURES.get(text.model_type, text.model_type)
    arch = next((a for a in MODEL_ARCH if MODEL_ARCH_NAMES.get(a) == wanted), None)
    if arch is None:
        raise ValueError(
            f"llama.cpp's tables have no family '{text.model_type}': measure it for training with --format nf4."
        )
    table = get_tensor_name_map(arch, text.num_hidden_layers)

    def name(tensor: str) -> str:
        found = table.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's '{wanted}' has no place for the tensor {tensor}.")
        return str(found)

    return name
