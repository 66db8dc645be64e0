"""Configurations of the hub models that scenarios name, as their pages show them: enough to predict memory without a network."""

from typing import Any

LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256}
# hub id -> (configuration class, fields)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-3.2-1B-Instruct": (
        "LlamaConfig",
        {
            **LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        "LlamaConfig",
        {
            **LLAMA, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        "LlamaConfig",
        {
            **LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336,
            "tie_word_embeddings": False,
        },
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        "MistralConfig",
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 32768, "tie_word_embeddings": False,
        },
    ),
    "Qwen/Qwen3-4B": (
        "Qwen3Config",
        {
            "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen3-8B": (
        "Qwen3Config",
        {
            "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
        },
    ),
    "google/gemma-3-4b-it": (
        "Gemma3Config",
        {
            "text_config": {
                "hidden_size": 2560, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 256, "intermediate_size": 10240, "vocab_size": 262208, "tie_word_embeddings": True,
            },
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 896, "patch_size": 14, "vision_use_head": False,
            },
            "mm_tokens_per_image": 256,
        },
    ),
    "microsoft/Phi-3.5-mini-instruct": (
        "Phi3Config",
        {
            "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "intermediate_size": 8192, "vocab_size": 32064, "tie_word_embeddings": False,
        },
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (
        "Qwen2Config",
        {
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
        },
    ),
    "openai/gpt-oss-20b": (
        "GptOssConfig",
        {
            "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880,
            "vocab_size": 201088, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def config(model: str) -> Any:
    import transformers

    kind, fields = SHAPES[model]
    return getattr(transformers, kind)(**fields)
